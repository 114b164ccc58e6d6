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
  // no drafts: its budget is for them. Nor does a sequence that is constrained, traced or replayed. Returns whether
  // learn() wants to know what becomes of the pass.
  bool propose(const std::vector<Scheduler::Chunk>& plan);
  // After such a pass, which took `seconds` and picked tokens for all of its sequences.
  void learn(const std::vector<Step>& steps, double seconds);

 private:
  int64_t most_;
  Scheduler::Options limits_;
  RollingKVCache& cache_;
  std::map<int64_t, double> seconds_;  // of a decoding pass, by its tokens: a moving average of what was measured
};

}  // namespace mixtral
