#include "roofline.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

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

double read_bandwidth(double bytes, const std::string& device, const std::function<void()>& check) {
  constexpr int kRuns = 7;
  const auto count = static_cast<int64_t>(std::clamp(bytes, 1e6, 1024.0 * 1024 * 1024) / sizeof(float));
  const at::Tensor buffer = at::ones({count}, at::dtype(at::kFloat).device(at::Device(device)));
  double fastest = std::numeric_limits<double>::infinity();
  for (int run = 0; run < kRuns; ++run) {
    check();
    const auto start = std::chrono::steady_clock::now();
    buffer.sum().item<float>();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    fastest = std::min(fastest, seconds.count());
  }
  return static_cast<double>(count) * sizeof(float) / fastest;
}

}  // namespace mixtral
