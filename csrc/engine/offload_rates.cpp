#include "offload_rates.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../checkpoint/expert_offload.h"
#include "../model/packing.h"
#include "../model/parameters.h"
#include "../model/transformer.h"
#include "engine.h"
#include "roofline.h"

namespace mixtral {
namespace {

using Check = std::function<void()>;

constexpr double kSampleBytes = 256.0 * 1024 * 1024;  // of experts: more than processors keep

// The median of several runs, each of which returns its seconds.
template <typename Run>
double median_seconds(const Check& check, const Run& run) {
  constexpr size_t kRuns = 5;
  std::vector<double> seconds;
  for (size_t i = 0; i < kRuns; ++i) {
    check();
    seconds.push_back(run());
  }
  std::nth_element(seconds.begin(), seconds.begin() + kRuns / 2, seconds.end());
  return seconds[kRuns / 2];
}

class NoExperts : public ExpertRunner {
 public:
  torch::Tensor run(int64_t, const torch::Tensor& x, const torch::Tensor&, const torch::Tensor&, const torch::Tensor&,
                    const torch::Tensor&) override {
    return torch::zeros_like(x);
  }
  ExpertCounts counts() const override { return {}; }
};

// Its experts are memory that nobody touches. Other weights are zeros, which take as long as any.
Mixtral model_without_experts(Config config, int64_t layers, const WeightType& type, torch::Device device) {
  config.num_layers = layers;
  ParameterMap experts;
  for (const Parameter& parameter : model_parameters(config))
    if (parameter.is_expert)
      experts.emplace(parameter.name, empty_parameter(parameter, scalar_type(type.dtype), torch::kCPU, type.packing));
  Mixtral model(config, scalar_type(type.dtype), device, type.packing, Placement(), nullptr, experts);
  for (const auto& item : model->named_parameters())
    if (!experts.count(item.key())) item.value().view(torch::kUInt8).zero_();
  model->set_expert_runner(std::make_shared<NoExperts>());
  return model;
}

// Of a token of a model of so many layers, beside its experts.
double seconds_beside_experts(const Config& config, int64_t layers, const WeightType& type, torch::Device device,
                              const Check& check) {
  constexpr int64_t kTokens = 33;  // the first one comes from the prompt
  Engine::Options options;
  options.max_batch = 1;
  options.ctx_size = kTokens + 1;
  options.prefix_cache = false;
  Engine engine(model_without_experts(config, layers, type, device), std::nullopt, options);
  SamplingParams params;
  params.max_tokens = kTokens;
  params.ignore_eos = true;
  const auto run = [&] {
    Timings timings;
    engine.generate({{0}}, {params}, nullptr, &timings);
    return timings.decode_seconds / static_cast<double>(timings.new_tokens - 1);
  };
  run();  // the first one allocates
  return median_seconds(check, run);
}

// Of one token's choice among `experts`, which are all on the device of `arena`, or none.
double seconds_of_choice(const Config& config, const WeightType& type, const ExpertWeights& experts, bool on_device,
                         torch::Device device, int64_t cpu_rows, const Check& check) {
  const int64_t count = experts.down.size(0), top_k = config.top_k;
  const ExpertTable table(1, std::vector<int64_t>(static_cast<size_t>(count), on_device));
  ExpertOffload offload(make_arena(device), {experts}, table, cpu_rows, scalar_type(type.dtype));
  const auto x = torch::full({1, config.hidden_size}, 0.01, torch::dtype(scalar_type(type.dtype)).device(device));
  const auto weights = torch::ones({1, top_k}, torch::dtype(torch::kFloat32).device(device));
  const auto ids = torch::arange(count, torch::dtype(torch::kInt32).device(device)).view({-1, top_k});
  const auto run = [&] {
    const auto start = std::chrono::steady_clock::now();
    torch::Tensor y;
    for (int64_t token = 0; token < ids.size(0); ++token)
      y = offload.run(0, x, weights, ids.narrow(0, token, 1), experts.gate_up, experts.down);
    y.cpu();  // waits for the device
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  run();
  return median_seconds(check, run) / static_cast<double>(count);
}

}  // namespace

OffloadRates measure_offload(const Config& config, const WeightType& type, const std::string& device_name,
                             const Check& check) {
  const torch::NoGradGuard no_grad;
  const torch::Device device(device_name);
  OffloadRates rates;
  rates.has_device = device.is_cpu() || at::hasCUDA();
  const ExpertWeights experts = sample_experts(config, type, std::min(kSampleBytes, weight_bytes(config, type)));
  if (!rates.has_device) {
    constexpr int64_t kAllRows = 1 << 20;
    rates.miss = seconds_of_choice(config, type, experts, /*on_device=*/false, torch::kCPU, kAllRows, check);
    return rates;
  }
  rates.miss = seconds_of_choice(config, type, experts, /*on_device=*/false, device, /*cpu_rows=*/-1, check);
  rates.hit = seconds_of_choice(config, type, experts, /*on_device=*/true, device, /*cpu_rows=*/0, check);
  const double one = seconds_beside_experts(config, 1, type, device, check);
  const double two = seconds_beside_experts(config, 2, type, device, check);
  rates.fixed = one + static_cast<double>(config.num_layers - 1) * std::max(two - one, 0.0);
  return rates;
}

}  // namespace mixtral
