#include "pass_routing.h"

#include <algorithm>
#include <map>

namespace mixtral {
namespace {

// The experts that the next `tokens` tokens of a sequence are forced to, if any.
void add_forced_rows(Sequence& sequence, int64_t tokens, std::vector<RoutingObserver::ForcedRow>& rows) {
  for (int64_t i = sequence.computed; i < sequence.computed + tokens; ++i) {
    const Trace* const replay = sequence.replay.get();
    if (replay && i == sequence.replayed && i < replay->tokens() &&
        replay->token_id[static_cast<size_t>(i)] == sequence.ids[static_cast<size_t>(i)])
      ++sequence.replayed;
    rows.push_back({i < sequence.replayed ? replay->routing.experts_of(i) : nullptr, sequence.experts_per_token});
  }
}

}  // namespace

std::unique_ptr<RoutingObserver> make_observer(const std::vector<Scheduler::Chunk>& plan, const Config& config,
                                               bool counts) {
  const auto replays = [](const auto& chunk) {
    const Sequence& sequence = *chunk.sequence;
    return sequence.replay && sequence.computed <= sequence.replayed && sequence.computed < sequence.replay->tokens();
  };
  const auto traces = [](const auto& chunk) { return chunk.sequence->generation.trace != nullptr; };
  const bool forces = std::any_of(plan.begin(), plan.end(), replays);
  if (!counts && !forces && !std::any_of(plan.begin(), plan.end(), traces)) return nullptr;
  auto observer = std::make_unique<RoutingObserver>(config, /*keep_logits=*/false);
  if (forces) {
    std::vector<RoutingObserver::ForcedRow> rows;
    for (const auto& [sequence, tokens] : plan) {
      add_forced_rows(*sequence, tokens, rows);
      rows.resize(rows.size() + sequence->draft.size());
    }
    observer->force(rows);
  }
  return observer;
}

void add_to_traces(RoutingObserver& observer, const std::vector<Scheduler::Chunk>& plan) {
  int64_t row = 0;
  for (const auto& [sequence, tokens] : plan) {
    if (Trace* const trace = sequence->generation.trace.get()) {
      const int64_t end = sequence->computed + tokens;
      const int64_t begin = std::clamp(trace->tokens(), sequence->computed, end);  // it has those before a preemption
      observer.append_to(trace->routing, row + begin - sequence->computed, end - begin);
      for (int64_t i = begin; i < end; ++i) {
        trace->token_id.push_back(static_cast<int32_t>(sequence->ids[static_cast<size_t>(i)]));
        trace->position.push_back(static_cast<int32_t>(i));
      }
      const auto size = static_cast<size_t>(trace->tokens());
      trace->predicted_id.resize(size, -1);
      trace->doc.resize(size);
      trace->domain.resize(size);
    }
    row += tokens + static_cast<int64_t>(sequence->draft.size());
  }
}

void count_routing(RoutingObserver& observer, const std::vector<Scheduler::Chunk>& plan, const std::vector<Step>& steps,
                   RoutingCounts& counts) {
  std::map<const Sequence*, int64_t> held;
  for (const Step& step : steps) held[step.sequence] = static_cast<int64_t>(step.samples.size()) - 1;
  int64_t row = 0;
  for (const auto& [sequence, tokens] : plan) {
    observer.count_in(counts, row, tokens + held[sequence]);
    row += tokens + static_cast<int64_t>(sequence->draft.size());
  }
}

}  // namespace mixtral
