#include "routing_observer.h"

#include <c10/util/Half.h>

#include <algorithm>

namespace mixtral {
namespace {

// On the host. From a GPU in one copy for all layers.
void move_to_host(std::vector<torch::Tensor>& layers) {
  if (!layers.empty() && !layers[0].is_cpu()) layers = torch::stack(layers).cpu().unbind();
}

// Rows [begin, begin + count) of the first n columns of the layers' [T,columns] -> behind `out`, [count,L,n].
template <typename From, typename To, typename Convert>
void append_rows(const std::vector<torch::Tensor>& layers, int64_t begin, int64_t count, int64_t n,
                 std::vector<To>& out, Convert convert) {
  const int64_t columns = layers[0].size(1), row = static_cast<int64_t>(layers.size()) * n;
  const size_t old = out.size();
  out.resize(old + static_cast<size_t>(count * row));
  To* to = out.data() + old;
  for (const torch::Tensor& layer : layers) {
    const From* from = layer.data_ptr<From>() + begin * columns;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < n; ++i) to[t * row + i] = convert(from[t * columns + i]);
    to += n;
  }
}

uint16_t half_bits(float value) { return c10::Half(value).x; }

}  // namespace

void RoutingObserver::force(const std::vector<ForcedRow>& rows) {
  const int64_t layers = config_.num_layers, tokens = static_cast<int64_t>(rows.size());
  int64_t most = 0;
  for (const ForcedRow& row : rows)
    if (row.experts) most = std::max(most, row.top_k);
  forced_ = torch::full({layers, tokens, most}, -1, torch::kInt32);
  auto* const forced = forced_.data_ptr<int32_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    const auto [experts, top_k] = rows[static_cast<size_t>(t)];
    for (int64_t layer = 0; experts && layer < layers; ++layer)
      std::copy_n(experts + layer * top_k, top_k, forced + (layer * tokens + t) * most);
  }
}

void RoutingObserver::force(const Routing& routing, int64_t begin, int64_t count) {
  std::vector<ForcedRow> rows;
  for (int64_t t = begin; t < begin + count; ++t) rows.push_back({routing.experts_of(t), routing.top_k});
  force(rows);
}

void RoutingObserver::append_to(Routing& routing, int64_t begin, int64_t count) {
  move_to_host(ids_);
  move_to_host(weights_);
  move_to_host(logits_);
  move_to_host(next_gate_ids_);
  const auto byte = [](int32_t id) { return static_cast<uint8_t>(id); };
  const int64_t top_k = routing.top_k;
  append_rows<int32_t>(ids_, begin, count, top_k, routing.topk_ids, byte);
  append_rows<float>(weights_, begin, count, top_k, routing.topk_weights, half_bits);
  if (keep_logits_) append_rows<float>(logits_, begin, count, routing.experts, routing.router_logits, half_bits);
  if (!next_gate_ids_.empty()) append_rows<int32_t>(next_gate_ids_, begin, count, top_k, routing.next_gate_ids, byte);
}

void RoutingObserver::count_in(RoutingCounts& counts, int64_t begin, int64_t count) {
  move_to_host(ids_);
  const int64_t top_k = ids_.at(0).size(1);
  std::vector<const int32_t*> layers;
  for (const torch::Tensor& ids : ids_) layers.push_back(ids.data_ptr<int32_t>() + begin * top_k);
  counts.add(layers, count, top_k);
}

}  // namespace mixtral
