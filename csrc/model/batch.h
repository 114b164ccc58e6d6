// The input of one forward pass: chunks of several sequences, packed one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "libtorch.h"

namespace mixtral {

class ForwardObserver;

// All tensors are int64, which no op converts.
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
};

// The same on the host, filled sequence by sequence.
struct HostBatch {
  std::vector<int64_t> input_ids, positions, slot_mapping, kv_lens, cu_seqlens = {0}, page_table;
  int64_t columns = 0;  // of page_table [B,columns]; 0: no cache

  int64_t tokens() const { return static_cast<int64_t>(input_ids.size()); }
  int64_t sequences() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
  // One more sequence: its next tokens, the first of them at `first_position`.
  void add_tokens(const std::vector<int64_t>& ids, int64_t first_position);
  // Adds copies of the first sequence, which must have one token, until there are `sequences`. Their keys go to the
  // slots from `first_slot` on. A copy takes the way of the original through all experts, so that padding never makes a
  // step read the weights of one more; and it needs no rule for tokens without a slot, which the CPU ops reject.
  void pad(int64_t sequences, int64_t first_slot);
  Batch to(torch::Device device) const;
};

int64_t round_up_to_power_of_two(int64_t n);

// Where a batch lies on a device: one block of memory, so that moving a batch there is one copy. Pinned on the host,
// the copy does not wait.
class BatchBuffer {
 public:
  BatchBuffer(int64_t tokens, int64_t sequences, int64_t columns, torch::Device device);
  // `batch` must have the sizes given above. The copy of the batch before must be done: whoever reads a result of its
  // forward pass on the host knows that.
  void fill(const HostBatch& batch);
  const Batch& batch() const { return batch_; }

 private:
  torch::Tensor host_, device_;  // int64; one and the same on the CPU
  Batch batch_;                  // views of device_
};

// A batch without a cache: whole sequences, attended with a block-diagonal mask.
Batch packed_batch(const std::vector<std::vector<int64_t>>& sequences, torch::Device device);

}  // namespace mixtral
