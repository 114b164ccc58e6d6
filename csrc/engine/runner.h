// What the engine needs of the model: a forward pass over what the scheduler planned.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../model/rolling_kv_cache.h"
#include "scheduler.h"
#include "sequence.h"

namespace mixtral {

class Runner {
 public:
  virtual ~Runner() = default;
  // Computes the tokens of the plan and counts them as computed. Returns a sample for each sequence all of whose tokens
  // are computed now; of a constrained one it keeps the logits instead.
  virtual std::vector<std::pair<Sequence*, Sample>> run(const std::vector<Scheduler::Chunk>& plan) = 0;
  // Picks the next token of a constrained sequence, from its logits and mask.
  virtual Sample sample_held(Sequence& sequence) const = 0;
  virtual RollingKVCache& cache() = 0;
};

}  // namespace mixtral
