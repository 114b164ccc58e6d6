// Records what the routers of one forward pass decide, and may decide for them.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "../model/config.h"
#include "../model/libtorch.h"
#include "../model/observer.h"
#include "routing_counts.h"
#include "trace.h"

namespace mixtral {

// For one pass: Batch::observer points to it until the pass is done.
class RoutingObserver : public ForwardObserver {
 public:
  RoutingObserver(const Config& config, bool keep_logits) : config_(config), keep_logits_(keep_logits) {}

  // The recorded experts of a row of the pass, uint8 [L,K] with the row's own K, or null where the router decides.
  struct ForcedRow {
    const uint8_t* experts;
    int64_t top_k;
  };
  // One for each row. A row whose recorded experts are the router's own keeps the router's weights, so nothing of it
  // changes, bit for bit. Elsewhere the weights are the router's softmax, over the recorded experts; a
  // select_bias has no part in it.
  void force(std::vector<ForcedRow> rows) { forced_ = std::move(rows); }
  // The same for a pass over the tokens [begin, begin + count) of `routing`.
  void force(const Routing& routing, int64_t begin, int64_t count);

  bool changes_routing() const override { return !forced_.empty(); }
  void after_route(const torch::Tensor& x, const torch::Tensor& router, const std::optional<torch::Tensor>& select_bias,
                   torch::Tensor& topk_weights, torch::Tensor& topk_ids) override;

  // After the pass: adds `count` of its rows from `begin` on to `routing`, which has their number of experts.
  void append_to(Routing& routing, int64_t begin, int64_t count);
  void count_in(RoutingCounts& counts, int64_t begin, int64_t count);

 private:
  void replace_experts(const torch::Tensor& logits, torch::Tensor& topk_weights, torch::Tensor& topk_ids);

  const Config& config_;
  const bool keep_logits_;
  std::vector<ForcedRow> forced_;             // one a row; empty: none
  std::vector<torch::Tensor> weights_, ids_;  // of each layer: f32 and int32 [T,K]
  std::vector<torch::Tensor> logits_;         // of each layer: f32 [T,E]
  std::vector<torch::Tensor> next_gate_ids_;  // of each layer but the last: int32 [T,K]
  torch::Tensor previous_x_;                  // [T,H], what the router of the layer before read
};

}  // namespace mixtral
