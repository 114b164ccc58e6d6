// Which part of a model one process holds. No torch in here.
//
// Pipeline parallelism gives each stage a run of layers; tensor parallelism gives each rank of a stage some rows of
// every matrix: heads of attention, whole experts, a part of the vocabulary. No sum crosses ranks then, so the result
// has the bits of one process. Without expert_parallel each expert is cut along its intermediate size instead, as in
// Megatron-LM (Shoeybi et al., 2019, section 3), and the parts of its output are summed: balanced, but other bits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "config.h"

namespace mixtral {

struct Parameter;

struct Placement {
  int tensor_size = 1, tensor_rank = 0;
  int stages = 1, stage = 0;  // stage 0 has the embeddings and the first layers, the last one the head
  bool expert_parallel = true;

  // The ranks of a stage are neighbours, and the last stage comes first: rank 0 has the logits, and so the engine.
  // Throws std::invalid_argument for a size that is not in [1, 4096] and for a rank that there is not.
  static Placement of_rank(int rank, int tensor_size, int stages, bool expert_parallel);
  int world_size() const { return tensor_size * stages; }
  int rank() const { return (stages - 1 - stage) * tensor_size + tensor_rank; }
  bool is_whole() const { return world_size() == 1; }
  bool is_first_stage() const { return stage == 0; }
  bool is_last_stage() const { return stage == stages - 1; }
  std::vector<int> stage_ranks(int of_stage) const;  // in the order of their tensor_rank

  // Throws std::invalid_argument unless heads, experts and layers can be cut this way; the message has both numbers.
  // Whether the parts can still be packed or quantised is told by unfit_size (weight_type.h).
  void check(const Config& config) const;

  int64_t first_layer(const Config& config) const;  // of this stage; stages differ by at most one layer
  int64_t end_layer(const Config& config) const;
  int64_t num_heads(const Config& config) const;  // of this rank
  // Of this rank. Where there are fewer than ranks, several ranks hold the same one.
  int64_t num_kv_heads(const Config& config) const;
  int64_t first_expert(const Config& config) const;
  int64_t num_experts(const Config& config) const;        // that this rank holds whole or in part
  int64_t intermediate_size(const Config& config) const;  // of what this rank holds of an expert or a dense block
  int64_t kv_bytes_per_token(const Config& config, int64_t element_size) const;  // of this rank's layers and heads
  std::string name() const;                                                      // "tensor 1 of 2, stage 0 of 2"
};

// Rows [begin, end) of a parameter seen as [rows, cols], cols its last dimension.
struct RowRange {
  int64_t begin, end;
};

// What one rank holds of a parameter of the whole model: these rows one after the other, and of each of them the
// columns [first_column, first_column + columns).
struct ParameterShard {
  std::vector<RowRange> rows;
  int64_t first_column, columns;
  std::vector<int64_t> shape;  // of the part
};

// Of `parameter` (parameters.h), which is of a layer of this stage or of none.
ParameterShard shard_of(const Parameter& parameter, const Config& config, const Placement& placement);
// The parameters of which the rank holds a part, in the order of model_parameters() and with the shapes of the whole.
std::vector<Parameter> placed_parameters(const Config& config, const Placement& placement);

}  // namespace mixtral
