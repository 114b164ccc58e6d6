#include "expert_read_ahead.h"

#include <algorithm>
#include <map>
#include <string>

#include "../model/ops.h"

namespace mixtral {
namespace {

// Of one expert of a weight [E, ...].
PageRange pages_of_expert(const torch::Tensor& weight, int64_t expert) {
  const auto bytes = static_cast<int64_t>(weight.nbytes()) / weight.size(0);
  return pages_around(static_cast<const char*>(weight.const_data_ptr()) + expert * bytes, static_cast<uint64_t>(bytes));
}

}  // namespace

ExpertReadAhead::ExpertReadAhead(const MappedWeights& weights) : shows_residency_(weights.shows_residency) {
  const auto& parameters = weights.parameters;
  for (const auto& [name, weight] : parameters) {
    const PageRange pages = pages_around(weight.const_data_ptr(), weight.nbytes());
    if (name == "embed_tokens" && parameters.count("lm_head")) {
      read_alone(pages);  // rows; when it is the lm_head too, every token reads all of it
    } else if (std::find(weights.experts.begin(), weights.experts.end(), name) == weights.experts.end()) {
      read_ahead(pages);  // every token needs it; a first touch would bring megabytes of experts along
    }
  }
}

torch::Tensor ExpertReadAhead::run(int64_t, const torch::Tensor& x, const torch::Tensor& topk_weights,
                                   const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
                                   const torch::Tensor& down_proj) {
  choose(topk_ids, gate_up_proj, down_proj);
  return ops::moe_mlp(x, topk_weights, topk_ids, gate_up_proj, down_proj);
}

void ExpertReadAhead::choose(const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
                             const torch::Tensor& down_proj) {
  std::map<int32_t, int64_t> choices;
  const auto ids = topk_ids.contiguous();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const int32_t id = ids.const_data_ptr<int32_t>()[i];
    if (0 <= id && id < gate_up_proj.size(0)) ++choices[id];
  }
  // In the order in which the experts are computed: gate and up of all of them, then down.
  std::map<int32_t, uint64_t> asked;
  for (const auto& [id, count] : choices) asked[id] = ask_for(pages_of_expert(gate_up_proj, id));
  for (const auto& [id, count] : choices) {
    asked[id] += ask_for(pages_of_expert(down_proj, id));
    (asked[id] == 0 ? hits_ : misses_) += count;
    bytes_ += asked[id];
  }
}

// Returns the bytes that were not in memory.
uint64_t ExpertReadAhead::ask_for(const PageRange& range) const {
  const std::vector<PageRange> missing = shows_residency_ ? missing_pages(range) : std::vector<PageRange>{range};
  if (missing.empty()) return 0;
  // When memory is short, the system drops what was not used for longest for the pages that come. That are often the
  // other pages of this expert, unless they are touched first.
  const char* here = range.begin;
  for (const PageRange& run : missing) {
    touch_pages(here, run.begin);
    here = run.begin + run.bytes;
  }
  touch_pages(here, range.begin + range.bytes);
  uint64_t bytes = 0;
  for (const PageRange& run : missing) {
    read_ahead(run);
    bytes += run.bytes;
  }
  return bytes;
}

}  // namespace mixtral
