// What the engine needs of the model: forward passes over what the scheduler planned.
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

// Several passes may be in flight, so that each stage of a pipeline has work; a sequence is in one of them at a time.
// What goes wrong with a sequence becomes its error; an exception ends all of the plan; a RankError ends the engine.
class Runner {
 public:
  virtual ~Runner() = default;
  // Begins a pass over the tokens of the plan and, behind them, the drafts. After an exception it has not begun.
  virtual void launch(const std::vector<Scheduler::Chunk>& plan) = 0;
  // Ends the oldest pass: picks tokens for each sequence all of whose tokens are computed now; of a constrained one it
  // keeps the logits instead. Counts the tokens as computed, and the guesses that held; the cache forgets the others.
  virtual std::vector<Step> collect() = 0;
  // Picks the next token of a constrained sequence, from its logits and mask.
  virtual Sample sample_held(Sequence& sequence) const = 0;
  virtual RollingKVCache& cache() = 0;
  // From the launch of the pass that was collected last, or the end of the one before, whichever is later, to its end.
  virtual double pass_seconds() const = 0;
  // Tells the other ranks, if there are any, that this one lives; to be called every ping_seconds() while nothing else
  // is sent to them. 0: there is nobody to tell. Throws RankError.
  virtual void ping() {}
  virtual double ping_seconds() const { return 0; }
};

}  // namespace mixtral
