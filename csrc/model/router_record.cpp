#include "router_record.h"

#include <limits>

#include "batch.h"
#include "ops.h"

namespace mixtral {
namespace {

// x [T,H], router [E,H] -> f32 [T,E]. The order of the sums is not that of ops::moe_route.
torch::Tensor router_logits(const torch::Tensor& x, const torch::Tensor& router) {
  Batch rows;
  rows.offs = torch::full({1}, x.size(0), torch::dtype(torch::kInt32).device(x.device()));
  return ops::linear(x.to(router.scalar_type()), router, rows).to(torch::kFloat32);
}

}  // namespace

void RouterRecord::begin(int64_t first_layer, torch::Tensor previous_x) {
  first_layer_ = first_layer;
  previous_x_ = std::move(previous_x);
}

void RouterRecord::add_layer(const torch::Tensor& x, const torch::Tensor& router,
                             const std::optional<torch::Tensor>& select_bias, torch::Tensor& topk_weights,
                             torch::Tensor& topk_ids) {
  torch::Tensor logits;
  if (keep_logits_ || forced_.defined()) logits = router_logits(x, router);
  if (forced_.defined()) force(logits, topk_weights, topk_ids);
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

void RouterRecord::force(const torch::Tensor& logits, torch::Tensor& topk_weights, torch::Tensor& topk_ids) const {
  auto forced = forced_.select(0, first_layer_ + static_cast<int64_t>(ids_.size())).to(topk_ids.device());
  forced = torch::constant_pad_nd(forced, {0, topk_ids.size(1) - forced.size(1)}, -1);
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

void RouterRecord::send(Communicator& world, int to) const {
  if (ids_.empty()) return;  // a dense model
  world.send(torch::stack({torch::stack(weights_).view(torch::kInt32), torch::stack(ids_)}), to);
  if (!logits_.empty()) world.send(torch::stack(logits_), to);
  if (!next_gate_ids_.empty()) world.send(torch::stack(next_gate_ids_), to);
}

void RouterRecord::receive(Communicator& world, int from, int64_t layers, bool is_first_stage) {
  if (ids_.empty()) return;
  const auto receive_like = [&](const torch::Tensor& layer, std::vector<int64_t> before) {
    before.insert(before.end(), {layer.size(0), layer.size(1)});
    const auto received = torch::empty(before, layer.options());
    world.receive(received, from);
    return received;
  };
  const auto put_first = [](std::vector<torch::Tensor>& part, const torch::Tensor& received) {
    const auto of_layers = received.unbind();
    part.insert(part.begin(), of_layers.begin(), of_layers.end());
  };
  const auto choices = receive_like(ids_[0], {2, layers});
  put_first(weights_, choices[0].view(torch::kFloat32));
  put_first(ids_, choices[1]);
  if (!keep_logits_) return;
  put_first(logits_, receive_like(logits_[0], {layers}));
  if (const int64_t guesses = is_first_stage ? layers - 1 : layers; guesses > 0)
    put_first(next_gate_ids_, receive_like(next_gate_ids_[0], {guesses}));
}

}  // namespace mixtral
