#include "replays.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>

#include "require.h"

namespace mixtral {
namespace {

// The tokens [begin, end), with nothing but what a replay needs.
std::shared_ptr<const Trace> part(const Trace& trace, size_t begin, size_t end) {
  const auto cut = [=](const auto& values, size_t of_a_token) {
    const auto first = values.begin() + static_cast<std::ptrdiff_t>(begin * of_a_token);
    return std::decay_t<decltype(values)>(first, first + static_cast<std::ptrdiff_t>((end - begin) * of_a_token));
  };
  auto result = std::make_shared<Trace>();
  result->model = trace.model;
  result->token_id = cut(trace.token_id, 1);
  result->position = cut(trace.position, 1);
  const Routing& from = trace.routing;
  Routing& routing = result->routing;
  routing.layers = from.layers, routing.top_k = from.top_k, routing.experts = from.experts;
  routing.topk_ids = cut(from.topk_ids, static_cast<size_t>(from.layers * from.top_k));
  return result;
}

}  // namespace

Replays::Replays(const Trace& trace) {
  size_t begin = 0;
  for (size_t i = 0; i < trace.position.size(); ++i) {
    const int32_t position = trace.position[i];
    if (position == 0 && i > 0) sequences_.push_back(part(trace, std::exchange(begin, i), i));
    require(position == static_cast<int32_t>(i - begin), "position must count from 0 in each sequence, got " +
                                                             std::to_string(position) + " at token " +
                                                             std::to_string(i));
  }
  if (begin < trace.position.size()) sequences_.push_back(part(trace, begin, trace.position.size()));
}

std::shared_ptr<const Trace> Replays::find(const std::vector<int64_t>& prompt, int64_t experts_per_token) const {
  std::shared_ptr<const Trace> best;
  int64_t furthest = 0;
  for (const auto& sequence : sequences_) {
    if (experts_per_token != 0 && experts_per_token != sequence->routing.top_k) continue;
    const int64_t both = std::min(sequence->tokens(), static_cast<int64_t>(prompt.size()));
    if (both <= furthest || replayed_tokens(*sequence, prompt) < both) continue;
    best = sequence;
    furthest = both;
  }
  return best;
}

int64_t replayed_tokens(const Trace& replay, const std::vector<int64_t>& read) {
  const auto& tokens = replay.token_id;
  return std::mismatch(tokens.begin(), tokens.end(), read.begin(), read.end()).first - tokens.begin();
}

}  // namespace mixtral
