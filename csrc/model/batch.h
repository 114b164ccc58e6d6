// The input of one forward pass: chunks of several sequences, packed one after the other.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "libtorch.h"

namespace mixtral {

class ForwardObserver;
class RouterRecord;

// All tensors are int64, so no op has to convert them.
struct Batch {
  torch::Tensor input_ids;   // [T]
  torch::Tensor positions;   // [T]
  torch::Tensor cu_seqlens;  // [B+1]
  torch::Tensor offs;        // [1]: T, the one group of a dense layer's grouped GEMM
  // Where keys and values go and are found; undefined when there is no cache.
  torch::Tensor slot_mapping;           // [T]: page * P + row
  torch::Tensor page_table;             // [B,R]
  torch::Tensor kv_lens;                // [B]: keys of each sequence, this batch's included
  ForwardObserver* observer = nullptr;  // sees the products of the pass (observer.h); may be null
  RouterRecord* routing = nullptr;      // keeps, and may change, what the routers decide (router_record.h); may be null
  int64_t experts_per_token = 0;        // of all tokens; 0: as many as the config says
  // Where tokens differ: the rows [n] with each number of experts.
  std::map<int64_t, torch::Tensor> rows_by_experts;
};

// A batch on the host, filled sequence by sequence.
struct HostBatch {
  std::vector<int64_t> input_ids, positions, slot_mapping, kv_lens, cu_seqlens = {0}, page_table;
  int64_t columns = 0;  // of page_table [B,columns]; 0: no cache

  int64_t tokens() const { return static_cast<int64_t>(input_ids.size()); }
  int64_t sequences() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
  // One more sequence: its next tokens, the first of them at `first_position`.
  void add_tokens(const std::vector<int64_t>& ids, int64_t first_position);
  // Adds copies of the first sequence, which must have one token, until there are `sequences`. Their keys go to the
  // slots from `first_slot` on. A copy is routed to the same experts as the original, so padding never makes a pass
  // read more weights. And every token has a slot: the CPU ops reject tokens without one.
  void pad(int64_t sequences, int64_t first_slot);
  Batch to(torch::Device device) const;
};

int64_t round_up_to_power_of_two(int64_t n);

// The memory of a batch on a device: one block, so that moving a batch there is one copy. The host side is pinned, so
// the copy is asynchronous.
class BatchBuffer {
 public:
  BatchBuffer(int64_t tokens, int64_t sequences, int64_t columns, torch::Device device);
  // `batch` must have the sizes given above. The previous copy must be done; it is once a result of that forward pass
  // was read on the host.
  void fill(const HostBatch& batch);
  const Batch& batch() const { return batch_; }

 private:
  torch::Tensor host_, device_;  // int64; one and the same on the CPU
  Batch batch_;                  // views of device_
};

// A batch without a cache: whole sequences, attended with a block-diagonal mask.
Batch packed_batch(const std::vector<std::vector<int64_t>>& sequences, torch::Device device);

}  // namespace mixtral
