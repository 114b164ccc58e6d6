// What the engine needs of the model: a forward pass over what the scheduler planned.
#pragma once

#include <cstdint>
#include <vector>

#include "../model/rolling_kv_cache.h"
#include "scheduler.h"
#include "sequence.h"

namespace mixtral {

// What a pass picked for a sequence: the guesses of its draft that held, and one token more.
struct Step {
  Sequence* sequence;
  std::vector<Sample> samples;
};

class Runner {
 public:
  virtual ~Runner() = default;
  // Computes the tokens of the plan, behind them the drafts, and picks tokens for each sequence all of whose tokens are
  // computed now; of a constrained one it keeps the logits instead. Counts the tokens as computed, and the guesses that
  // held; the cache forgets the others. What goes wrong with a sequence becomes its error; an exception ends all of the
  // plan.
  virtual std::vector<Step> run(const std::vector<Scheduler::Chunk>& plan) = 0;
  // Picks the next token of a constrained sequence, from its logits and mask.
  virtual Sample sample_held(Sequence& sequence) const = 0;
  virtual RollingKVCache& cache() = 0;
  virtual double pass_seconds() const = 0;  // that the last run() took
};

}  // namespace mixtral
