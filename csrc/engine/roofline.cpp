#include "roofline.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../io/new_pages.h"
#include "../model/memory.h"
#include "../model/ops.h"
#include "../model/packing.h"
#include "../model/parameters.h"

namespace mixtral {

double weight_bytes_per_token(const Config& config, int64_t batch, double bytes_per_weight) {
  const double experts = static_cast<double>(config.num_experts), top_k = static_cast<double>(config.top_k);
  const double expert = 3.0 * static_cast<double>(config.hidden_size * config.intermediate_size);
  double shared = static_cast<double>(config.active_parameters());
  if (!config.tie_word_embeddings) shared -= static_cast<double>(config.vocab_size * config.hidden_size);
  double routed = 0;
  if (config.is_moe()) {
    const double used = experts * (1 - std::pow(1 - top_k / experts, static_cast<double>(batch)));
    shared -= static_cast<double>(config.num_layers) * top_k * expert;
    routed = static_cast<double>(config.num_layers) * used * expert;
  }
  return bytes_per_weight * (shared + routed) / static_cast<double>(batch);
}

namespace {

// Of several runs of `work`, the fastest.
template <typename Work>
double least_seconds(int runs, const std::function<void()>& check, const Work& work) {
  double fastest = std::numeric_limits<double>::infinity();
  for (int run = 0; run < runs; ++run) {
    check();
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    fastest = std::min(fastest, seconds.count());
  }
  return fastest;
}

}  // namespace

double read_bandwidth(double bytes, const std::string& device, const std::function<void()>& check) {
  constexpr int kRuns = 7;
  const auto count = static_cast<int64_t>(std::clamp(bytes, 1e6, 1024.0 * 1024 * 1024) / sizeof(float));
  const at::Tensor buffer = at::ones({count}, at::dtype(at::kFloat).device(at::Device(device)));
  const double fastest = least_seconds(kRuns, check, [&] { buffer.sum().item<float>(); });
  return static_cast<double>(count) * sizeof(float) / fastest;
}

ExpertWeights sample_experts(const Config& config, const WeightType& type, double most_bytes) {
  constexpr int kByte = 0x3c;  // in every type a number of moderate size
  const int64_t top_k = std::max<int64_t>(config.top_k, 1);
  std::vector<Parameter> block;  // gate_up_proj, down_proj of one layer
  double expert = 0;
  for (const Parameter& parameter : model_parameters(config)) {
    if (parameter.layer != 0 || (parameter.cut != Cut::kGateUp && parameter.cut != Cut::kDown)) continue;
    block.push_back(parameter);
    expert += parameter_bytes(parameter, type) / static_cast<double>(parameter.shape[0]);
  }
  const auto tokens = static_cast<int64_t>(most_bytes / (expert * static_cast<double>(top_k)));
  const int64_t count = std::max<int64_t>(tokens, 1) * top_k;
  check_memory("experts to measure with", expert * static_cast<double>(count), "cpu");
  ExpertWeights experts;
  for (Parameter& parameter : block) {
    parameter.shape[0] = count;
    torch::Tensor& weights = parameter.cut == Cut::kGateUp ? experts.gate_up : experts.down;
    weights = empty_parameter(parameter, scalar_type(type.dtype), torch::kCPU, type.packing);
    // In such pages as those of the model.
    LargePages().bring(pages_around(weights.data_ptr(), weights.nbytes()));
    std::memset(weights.data_ptr(), kByte, weights.nbytes());
  }
  return experts;
}

double product_bandwidth(const Config& config, const WeightType& type, double most_bytes,
                         const std::function<void()>& check) {
  constexpr int kRuns = 5;
  constexpr double kMostBytes = 512.0 * 1024 * 1024;
  const torch::NoGradGuard no_grad;
  const int64_t top_k = std::max<int64_t>(config.top_k, 1);
  const ExpertWeights experts = sample_experts(config, type, std::min(most_bytes, kMostBytes));
  const auto bytes = static_cast<double>(experts.gate_up.nbytes() + experts.down.nbytes());
  const auto x = torch::full({1, config.hidden_size}, 0.01, scalar_type(type.dtype));
  const auto topk_weights = torch::ones({1, top_k}, torch::kFloat32);
  const double seconds = least_seconds(kRuns, check, [&] {
    for (int64_t first = 0; first < experts.down.size(0); first += top_k)
      ops::moe_mlp(x, topk_weights, torch::arange(first, first + top_k, torch::kInt32).view({1, top_k}),
                   experts.gate_up, experts.down);
  });
  return bytes / seconds;
}

}  // namespace mixtral
