#include "routing_observer.h"

#include <c10/util/Half.h>

#include <limits>

#include "../model/ops.h"

namespace mixtral {
namespace {

// x [T,H], router [E,H] -> f32 [T,E]. The order of the sums is not that of ops::moe_route.
torch::Tensor router_logits(const torch::Tensor& x, const torch::Tensor& router) {
  Batch rows;
  rows.offs = torch::full({1}, x.size(0), torch::dtype(torch::kInt32).device(x.device()));
  return ops::linear(x.to(router.scalar_type()), router, rows).to(torch::kFloat32);
}

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

void RoutingObserver::force(const Routing& routing, int64_t begin, int64_t count) {
  forced_.clear();
  for (int64_t t = begin; t < begin + count; ++t) forced_.push_back({routing.experts_of(t), routing.top_k});
}

void RoutingObserver::after_route(const torch::Tensor& x, const torch::Tensor& router,
                                  const std::optional<torch::Tensor>& select_bias, torch::Tensor& topk_weights,
                                  torch::Tensor& topk_ids) {
  torch::Tensor logits;
  if (keep_logits_ || !forced_.empty()) logits = router_logits(x, router);
  if (!forced_.empty()) replace_experts(logits, topk_weights, topk_ids);
  weights_.push_back(topk_weights);
  ids_.push_back(topk_ids);
  if (!keep_logits_) return;
  logits_.push_back(logits);
  if (previous_x_.defined()) {
    const auto guess = ops::moe_route(previous_x_, router, topk_ids.size(1), config_.renormalize, select_bias);
    next_gate_ids_.push_back(std::get<1>(guess));
  }
  previous_x_ = x;
}

void RoutingObserver::replace_experts(const torch::Tensor& logits, torch::Tensor& topk_weights,
                                      torch::Tensor& topk_ids) {
  const int64_t top_k = topk_ids.size(1), layer = static_cast<int64_t>(ids_.size());
  auto forced = torch::full({topk_ids.size(0), top_k}, -1, torch::kInt32);
  for (int64_t t = 0; t < topk_ids.size(0); ++t) {
    const ForcedRow& row = forced_.at(static_cast<size_t>(t));
    for (int64_t k = 0; row.experts && k < row.top_k; ++k)
      forced.data_ptr<int32_t>()[t * top_k + k] = row.experts[layer * row.top_k + k];
  }
  forced = forced.to(topk_ids.device());
  forced = torch::where(forced < 0, topk_ids, forced);
  const auto same = (forced == topk_ids).all(1, /*keepdim=*/true);  // [T,1]
  const auto chosen = forced.clamp_min(0).to(torch::kInt64);
  const auto probabilities =
      config_.renormalize
          ? logits.gather(1, chosen).masked_fill(forced < 0, -std::numeric_limits<float>::infinity()).softmax(1)
          : logits.softmax(1).gather(1, chosen);
  topk_weights = torch::where(same, topk_weights, probabilities);
  topk_ids = forced;
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
