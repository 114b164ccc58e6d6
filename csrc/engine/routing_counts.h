// How many tokens went to every expert of every layer, in all requests together. No torch in here.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace mixtral {

// The engine's thread counts; any thread may read.
class RoutingCounts {
 public:
  struct Totals {
    int64_t layers = 0, experts = 0;
    int64_t tokens = 0;           // that the model read, of prompts and answers
    std::vector<int64_t> first;   // [L,E], tokens whose first choice the expert was
    std::vector<int64_t> chosen;  // [L,E], tokens that went to the expert, as any choice
  };

  RoutingCounts(int64_t layers, int64_t experts);

  // topk_ids: of each layer, [tokens,top_k] with falling weights. An id below 0 is none.
  void add(const std::vector<const int32_t*>& topk_ids, int64_t tokens, int64_t top_k);
  Totals totals() const;

 private:
  mutable std::mutex mutex_;
  Totals totals_;
};

}  // namespace mixtral
