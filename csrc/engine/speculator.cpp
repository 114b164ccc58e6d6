#include "speculator.h"

#include <algorithm>

namespace mixtral {
namespace {

constexpr double kNewest = 0.3;  // the weight of the newest value in a moving average

// Its newest token is the only one that is not computed.
bool decodes(const Scheduler::Chunk& chunk) {
  return !chunk.sequence->in_prefill() && chunk.sequence->computed + 1 == chunk.sequence->length();
}

}  // namespace

bool Speculator::propose(const std::vector<Scheduler::Chunk>& plan) {
  const auto sequences = static_cast<int64_t>(plan.size());
  if (most_ == 0 || !std::all_of(plan.begin(), plan.end(), decodes)) return false;
  // What a pass without drafts takes must be known: a gain is relative to it.
  if (seconds_.count(sequences) == 0) return true;
  int64_t budget = limits_.token_budget - sequences;
  for (const auto& chunk : plan) {
    Sequence& sequence = *chunk.sequence;
    if (sequence.constrained || sequence.generation.trace || sequence.replay) continue;
    const auto generated = static_cast<int64_t>(sequence.generation.token_ids.size());
    const int64_t most = std::min({most_, limits_.chunk_size - 1, budget, sequence.params.max_tokens - generated - 1});
    if (most <= 0) continue;
    if (const int64_t longest = sequence.gate.open(most)) sequence.draft = look_up(sequence.ids, longest);
    const auto tokens = static_cast<int64_t>(sequence.draft.size());
    if (!cache_.reserve(sequence.cache_id, 1 + tokens)) sequence.draft.clear();
    budget -= tokens;
  }
  return true;
}

void Speculator::learn(const std::vector<Step>& steps, double seconds) {
  const auto sequences = static_cast<int64_t>(steps.size());
  int64_t tokens = sequences;
  for (const Step& step : steps) tokens += static_cast<int64_t>(step.sequence->draft.size());
  const auto [pass, added] = seconds_.emplace(tokens, seconds);
  if (!added) pass->second += kNewest * (seconds - pass->second);
  for (const Step& step : steps)
    if (!step.sequence->draft.empty())
      step.sequence->gate.learn(static_cast<double>(step.samples.size()) * seconds_.at(sequences) / pass->second);
}

}  // namespace mixtral
