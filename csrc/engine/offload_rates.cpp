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

using Trial = std::function<double()>;  // returns its seconds

// The median of each trial. They take turns, so that other work on the machine slows all of them alike.
std::vector<double> median_seconds(const std::vector<Trial>& trials, const Check& check) {
  constexpr size_t kRounds = 11;
  for (const Trial& trial : trials) trial();  // the first run allocates
  std::vector<std::vector<double>> seconds(trials.size());
  for (size_t round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < trials.size(); ++i) {
      check();
      seconds[i].push_back(trials[i]());
    }
  }
  std::vector<double> medians;
  for (auto& values : seconds) {
    std::sort(values.begin(), values.end());
    medians.push_back(values[kRounds / 2]);
  }
  return medians;
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
Trial token_beside_experts(const Config& config, int64_t layers, const WeightType& type, torch::Device device) {
  constexpr int64_t kTokens = 9;  // the first one comes from the prompt
  Engine::Options options;
  options.max_batch = 1;
  options.ctx_size = kTokens + 1;
  options.prefix_cache = false;
  const auto engine =
      std::make_shared<Engine>(model_without_experts(config, layers, type, device), std::nullopt, options);
  SamplingParams params;
  params.max_tokens = kTokens;
  params.ignore_eos = true;
  return [=] {
    Timings timings;
    engine->generate({{0}}, {params}, nullptr, &timings);
    return timings.decode_seconds / static_cast<double>(timings.new_tokens - 1);
  };
}

// Of a choice among `experts`, which are all on the device, or none.
Trial choice(const Config& config, const WeightType& type, const ExpertWeights& experts, bool on_device,
             torch::Device device, int64_t cpu_rows) {
  const int64_t count = experts.down.size(0), top_k = config.top_k;
  const ExpertTable table(1, std::vector<int64_t>(static_cast<size_t>(count), on_device));
  const auto offload = std::make_shared<ExpertOffload>(make_arena(device), std::vector<ExpertWeights>{experts}, table,
                                                       cpu_rows, scalar_type(type.dtype));
  const auto x = torch::full({1, config.hidden_size}, 0.01, torch::dtype(scalar_type(type.dtype)).device(device));
  const auto weights = torch::ones({1, top_k}, torch::dtype(torch::kFloat32).device(device));
  const auto ids = torch::arange(count, torch::dtype(torch::kInt32).device(device)).view({-1, top_k});
  return [=] {
    const auto start = std::chrono::steady_clock::now();
    torch::Tensor y;
    for (int64_t token = 0; token < ids.size(0); ++token)
      y = offload->run(0, x, weights, ids.narrow(0, token, 1), experts.gate_up, experts.down);
    y.cpu();  // waits for the device
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return seconds.count() / static_cast<double>(count);
  };
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
    constexpr int64_t kAnyRows = 1 << 20;  // nothing is fetched
    rates.miss = median_seconds({choice(config, type, experts, /*on_device=*/false, torch::kCPU, kAnyRows)}, check)[0];
    return rates;
  }
  const std::vector<double> choices =
      median_seconds({choice(config, type, experts, /*on_device=*/true, device, /*cpu_rows=*/0),
                      choice(config, type, experts, /*on_device=*/false, device, /*cpu_rows=*/-1)},
                     check);
  rates.hit = choices[0];
  rates.miss = choices[1];
  // Not in turn with choices: engines have threads of their own, and the next choice would have to start its anew.
  constexpr int64_t kMostLayers = 8;
  const int64_t layers = std::min(config.num_layers, kMostLayers);
  const std::vector<double> tokens = median_seconds(
      {token_beside_experts(config, layers, type, device), token_beside_experts(config, 1, type, device)}, check);
  const double layer = layers > 1 ? std::max(tokens[0] - tokens[1], 0.0) / static_cast<double>(layers - 1) : 0;
  rates.fixed = tokens[0] + static_cast<double>(config.num_layers - layers) * layer;
  return rates;
}

}  // namespace mixtral
