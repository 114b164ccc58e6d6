#include "speculation.h"

#include <algorithm>

namespace mixtral {
namespace {

constexpr std::ptrdiff_t kLongestMatch = 4, kShortestMatch = 2;
constexpr double kWorthIt = 1.05;  // the least gain for which the gate stays open
constexpr int64_t kWait = 64;      // passes until a closed gate tries again
constexpr int64_t kTrial = 2;      // tokens of such a try: few, since it mostly fails
constexpr double kNewest = 0.3;    // the weight of the newest value in a moving average

}  // namespace

std::vector<int64_t> look_up(const std::vector<int64_t>& ids, int64_t most) {
  for (auto length = kLongestMatch; length >= kShortestMatch; --length) {
    if (static_cast<std::ptrdiff_t>(ids.size()) <= length) continue;
    const auto newest = ids.end() - length;
    const auto found = std::find_end(ids.begin(), ids.end() - 1, newest, ids.end());
    if (found == ids.end() - 1) continue;
    const auto period = static_cast<size_t>(newest - found);
    std::vector<int64_t> draft(found + length, found + length + std::min<std::ptrdiff_t>(most, newest - found));
    while (static_cast<int64_t>(draft.size()) < most) draft.push_back(draft[draft.size() - period]);
    return draft;
  }
  return {};
}

int64_t DraftGate::open(int64_t most) {
  if (wait_ > 0) {
    --wait_;
    return 0;
  }
  return gain_ < kWorthIt ? std::min(most, kTrial) : most;
}

void DraftGate::learn(double gain) {
  gain_ += kNewest * (gain - gain_);
  if (gain_ < kWorthIt) wait_ = kWait;
}

}  // namespace mixtral
