// Experts in mapped files: as soon as the router has chosen, a thread asks the system for the pages that they lack,
// while the pages that have come are computed with. The system alone would find out page by page.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "../io/mapped_file.h"
#include "../model/expert_runner.h"
#include "mapped_weights.h"

namespace mixtral {

class ExpertReadAhead : public ExpertRunner {
 public:
  // The pages of experts and embeddings come one by one from now on unless they are asked for, those of other weights
  // are asked for here. Where the files do not
  // show residency (mapped_file.h), every chosen expert is asked for whole and is a miss.
  explicit ExpertReadAhead(const MappedWeights& weights);
  ~ExpertReadAhead() override;

  torch::Tensor run(int64_t layer, const torch::Tensor& x, const torch::Tensor& topk_weights,
                    const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
                    const torch::Tensor& down_proj) override;
  void choose(const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
              const torch::Tensor& down_proj) override;
  ExpertCounts counts() const override;  // of all choices so far: waits for the thread

 private:
  struct Chosen {
    int64_t choices;  // of tokens
    PageRange gate_up, down;
  };
  using Layer = std::vector<Chosen>;
  void work();
  ExpertCounts ask_for(const Layer& layer) const;
  uint64_t ask_for(const PageRange& range) const;

  const bool shows_residency_;
  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  mutable std::condition_variable done_;
  bool busy_ = false;
  std::deque<Layer> queue_;
  bool stopped_ = false;
  ExpertCounts counts_;
  std::thread thread_;
};

}  // namespace mixtral
