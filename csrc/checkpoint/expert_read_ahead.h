// Experts in mapped files: as soon as the router has chosen, the system is asked for the pages that they lack, and
// reads them while the first ones are computed with. All is asked for before the computation begins, by its thread:
// where a computation comes to a page first, it waits, and the system reads megabytes around that page.
#pragma once

#include <atomic>

#include "../io/mapped_file.h"
#include "../model/expert_runner.h"
#include "mapped_weights.h"

namespace mixtral {

class ExpertReadAhead : public ExpertRunner {
 public:
  // The weights beside experts are asked for here, and rows of embeddings come one by one from now on. Where the files
  // do not show residency (mapped_file.h), every chosen expert is asked for whole and is a miss.
  explicit ExpertReadAhead(const MappedWeights& weights);

  torch::Tensor run(int64_t layer, const torch::Tensor& x, const torch::Tensor& topk_weights,
                    const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
                    const torch::Tensor& down_proj) override;
  void choose(const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
              const torch::Tensor& down_proj) override;
  ExpertCounts counts() const override { return {hits_, misses_, bytes_}; }

 private:
  uint64_t ask_for(const PageRange& range) const;

  const bool shows_residency_;
  std::atomic<int64_t> hits_{0}, misses_{0};
  std::atomic<uint64_t> bytes_{0};
};

}  // namespace mixtral
