#include "routing_counts.h"

namespace mixtral {

RoutingCounts::RoutingCounts(int64_t layers, int64_t experts) {
  totals_.layers = layers;
  totals_.experts = experts;
  totals_.first.resize(static_cast<size_t>(layers * experts));
  totals_.chosen = totals_.first;
}

void RoutingCounts::add(const std::vector<const int32_t*>& topk_ids, int64_t tokens, int64_t top_k) {
  const std::lock_guard lock(mutex_);
  totals_.tokens += tokens;
  int64_t* first = totals_.first.data();
  int64_t* chosen = totals_.chosen.data();
  for (const int32_t* ids : topk_ids) {
    for (int64_t i = 0; i < tokens * top_k; ++i) {
      if (ids[i] < 0) continue;
      ++chosen[ids[i]];
      if (i % top_k == 0) ++first[ids[i]];
    }
    first += totals_.experts;
    chosen += totals_.experts;
  }
}

RoutingCounts::Totals RoutingCounts::totals() const {
  const std::lock_guard lock(mutex_);
  return totals_;
}

}  // namespace mixtral
