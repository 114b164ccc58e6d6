// Gives the sequences of a decoding pass drafts (speculation.h), and learns from what became of them.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "runner.h"

namespace mixtral {

class Speculator {
 public:
  // most: tokens of a draft; 0: no drafts.
  Speculator(int64_t most, const Scheduler::Options& limits, RollingKVCache& cache)
      : most_(most), limits_(limits), cache_(cache) {}

  // Fills Sequence::draft, within the limits of a pass and with pages that nobody uses. A pass that reads prompts gets
  // no drafts: its budget is for them. Nor does a sequence that is constrained, traced or replayed.
  void propose(const std::vector<Scheduler::Chunk>& plan);
  // After the pass, which took `seconds`.
  void learn(const std::vector<Step>& steps, double seconds);

 private:
  int64_t most_;
  Scheduler::Options limits_;
  RollingKVCache& cache_;
  size_t decoding_ = 0;                // sequences of the pass, if it computes one token of each
  std::map<int64_t, double> seconds_;  // of a decoding pass, by its tokens: a moving average of what was measured
};

}  // namespace mixtral
