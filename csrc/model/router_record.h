// What the routers decide in one pass, and what is decided for them. Batch::routing points to it until the pass is
// done; each rank has one of its own for its layers, and rank 0 gathers those of the other stages.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../distributed/communicator.h"
#include "config.h"
#include "libtorch.h"

namespace mixtral {

class RouterRecord {
 public:
  // forced: int32 [L,T,n] of all layers of the model, the experts of each token, or -1 where the router decides;
  // undefined: it always does. A token whose forced experts are the router's own keeps the router's weights, so nothing
  // of it changes, bit for bit. Elsewhere the weights are the router's softmax, over the forced experts; a select_bias
  // has no part in it.
  RouterRecord(const Config& config, bool keep_logits, torch::Tensor forced = {})
      : config_(config), keep_logits_(keep_logits), forced_(std::move(forced)) {}

  bool keeps_logits() const { return keep_logits_; }
  const torch::Tensor& forced() const { return forced_; }

  // Before the layers of a stage; previous_x: where the layer before them is another stage's, and logits are kept,
  // [T,H] as of last_x().
  void begin(int64_t first_layer, torch::Tensor previous_x = {});
  // x [T,H] was routed by router [E,H] and select_bias f32 [E], which most models do not have: topk_weights f32 [T,K],
  // topk_ids int32 [T,K], which the experts get. An id of -1 is none: the token has fewer experts than others
  // (Batch::rows_by_experts).
  void add_layer(const torch::Tensor& x, const torch::Tensor& router, const std::optional<torch::Tensor>& select_bias,
                 torch::Tensor& topk_weights, torch::Tensor& topk_ids);
  const torch::Tensor& last_x() const { return previous_x_; }

  // The layers of an earlier stage, to rank 0, which puts them before its own.
  void send(Communicator& world, int to) const;
  void receive(Communicator& world, int from, int64_t layers, bool is_first_stage);

 protected:
  const Config& config_;
  const bool keep_logits_;
  torch::Tensor forced_;
  std::vector<torch::Tensor> weights_, ids_;  // of each layer: f32 and int32 [T,K]
  std::vector<torch::Tensor> logits_;         // of each layer, if kept: f32 [T,E]
  // Of each layer but the first, if logits are kept: int32 [T,K], what its router makes of the x of the layer before.
  std::vector<torch::Tensor> next_gate_ids_;

 private:
  void force(const torch::Tensor& logits, torch::Tensor& topk_weights, torch::Tensor& topk_ids) const;

  int64_t first_layer_ = 0;
  torch::Tensor previous_x_;  // [T,H], what the router of the layer before read
};

}  // namespace mixtral
