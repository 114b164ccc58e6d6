// Computes the experts of a layer where their weights do not simply lie in the device's memory.
#pragma once

#include <cstdint>

#include "libtorch.h"

namespace mixtral {

struct ExpertCounts {
  int64_t hits = 0, misses = 0;  // choices of tokens whose expert was, or was not, in memory when it was chosen
  uint64_t bytes = 0;            // of weights that were fetched
};

class ExpertRunner {
 public:
  virtual ~ExpertRunner() = default;
  // Arguments and result of ops::moe_mlp; gate_up_proj and down_proj are those of layer `layer`.
  virtual torch::Tensor run(int64_t layer, const torch::Tensor& x, const torch::Tensor& topk_weights,
                            const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
                            const torch::Tensor& down_proj) = 0;
  // Before something else computes these experts: they were chosen. Ids outside of [0,E) are of others.
  virtual void choose(const torch::Tensor& /*topk_ids*/, const torch::Tensor& /*gate_up_proj*/,
                      const torch::Tensor& /*down_proj*/) {}
  virtual ExpertCounts counts() const = 0;  // so far, from any thread
};

}  // namespace mixtral
