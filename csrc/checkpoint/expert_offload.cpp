#include "expert_offload.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>

#include "../io/file.h"
#include "../io/json.h"
#include "../io/load_error.h"
#include "../model/ops.h"
#include "../model/packing.h"

namespace mixtral {
namespace {

ExpertWeights of_expert(const ExpertWeights& layer, int64_t expert) {
  return {layer.gate_up.narrow(0, expert, 1), layer.down.narrow(0, expert, 1)};
}

// rows [n,H] of one expert -> [n,H]. A weight of one leaves the sums of moe_mlp as they are, so these are the rows that
// moe_mlp of all experts would weigh and add.
torch::Tensor compute(const torch::Tensor& rows, const ExpertWeights& expert) {
  const auto options = rows.options();
  const auto weights = torch::ones({rows.size(0), 1}, options.dtype(torch::kFloat32));
  const auto ids = torch::zeros({rows.size(0), 1}, options.dtype(torch::kInt32));
  return ops::moe_mlp(rows, weights, ids, expert.gate_up, expert.down);
}

template <typename F>
double seconds_of(const F& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

ExpertTable read_expert_counts(const std::filesystem::path& file) {
  constexpr uint64_t kMostBytes = 64 << 20;
  const nlohmann::json object = parse_json(read_text(file, kMostBytes), file.string());
  const auto fail = [&] {
    throw LoadError(file.string(), "topk_assignments", "must be an object of [[counts of experts], one a layer]");
  };
  const auto found = object.find("topk_assignments");
  if (found == object.end() || !found->is_object() || found->empty()) fail();
  ExpertTable total;
  for (const auto& [name, layers] : found->items()) {
    if (!layers.is_array() || (!total.empty() && layers.size() != total.size())) fail();
    if (total.empty()) total.resize(layers.size());
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      const nlohmann::json& experts = layers[layer];
      if (!experts.is_array() || (!total[layer].empty() && experts.size() != total[layer].size())) fail();
      total[layer].resize(experts.size());
      for (size_t expert = 0; expert < experts.size(); ++expert) {
        if (!experts[expert].is_number_unsigned()) fail();
        total[layer][expert] += experts[expert].get<int64_t>();
      }
    }
  }
  return total;
}

ExpertTable place_experts(const Config& config, int64_t count, const ExpertTable& counts) {
  const auto layers = static_cast<size_t>(config.num_layers), experts = static_cast<size_t>(config.num_experts);
  const auto has_other_size = [&](const auto& layer) { return layer.size() != experts; };
  if (!counts.empty() && (counts.size() != layers || std::any_of(counts.begin(), counts.end(), has_other_size))) {
    throw std::invalid_argument("routing counts must be of " + std::to_string(layers) + " layers of " +
                                std::to_string(experts) + " experts");
  }
  std::vector<size_t> order(layers * experts);  // expert * layers + layer
  std::iota(order.begin(), order.end(), size_t{0});
  if (!counts.empty()) {
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return counts[a % layers][a / layers] > counts[b % layers][b / layers];
    });
  }
  order.resize(std::min(order.size(), static_cast<size_t>(std::max<int64_t>(count, 0))));
  ExpertTable placed(layers, std::vector<int64_t>(experts, 0));
  for (const size_t i : order) placed[i % layers][i / layers] = 1;
  return placed;
}

ExpertOffload::ExpertOffload(std::unique_ptr<DeviceArena> arena, const std::vector<ExpertWeights>& layers,
                             const ExpertTable& on_device, int64_t cpu_rows, torch::ScalarType dtype)
    : arena_(std::move(arena)), cpu_rows_(cpu_rows) {
  const torch::NoGradGuard no_grad;
  const ExpertWeights first = of_expert(layers.at(0), 0);
  for (ExpertWeights& buffer : staging_) buffer = {arena_->allocate(first.gate_up), arena_->allocate(first.down)};
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    resident_.emplace_back(on_device.at(layer).size());
    for (size_t expert = 0; expert < on_device[layer].size(); ++expert) {
      if (!on_device[layer][expert]) continue;
      const ExpertWeights from = of_expert(layers[layer], static_cast<int64_t>(expert));
      ExpertWeights& to = resident_[layer][expert];
      to = {arena_->allocate(from.gate_up), arena_->allocate(from.down)};
      to.gate_up.copy_(from.gate_up);
      to.down.copy_(from.down);
    }
  }
  if (cpu_rows_ < 0) cpu_rows_ = measure_cpu_rows(layers[0], dtype);
}

// So many rows take the CPU as long as a copy of the expert: times of one row and of many give the line between.
int64_t ExpertOffload::measure_cpu_rows(const ExpertWeights& layer, torch::ScalarType dtype) {
  constexpr int64_t kManyRows = 65, kMostRows = 4096;
  const ExpertWeights expert = of_expert(layer, 0);
  const int64_t hidden = expert.down.size(1) * (is_packed(expert.down) ? kPackedRows : 1);
  const auto x = torch::zeros({kManyRows, hidden}, dtype), on_device = x.narrow(0, 0, 1).to(arena_->device());
  const auto on_cpu = [&](int64_t rows) { return seconds_of([&] { compute(x.narrow(0, 0, rows), expert); }); };
  const auto fetched = [&] {
    fetch(0, expert);
    arena_->await(0);
    compute(on_device, staging_[0]).cpu();  // waits for the device
    arena_->release(0);
  };
  double one = 1e9, many = 1e9, copy = 1e9;
  for (int round = 0; round < 3; ++round) {
    one = std::min(one, on_cpu(1));
    many = std::min(many, on_cpu(kManyRows));
    copy = std::min(copy, seconds_of(fetched));
  }
  const double row = std::max((many - one) / (kManyRows - 1), 1e-9);
  return std::clamp(1 + static_cast<int64_t>((copy - one) / row), int64_t{0}, kMostRows);
}

ExpertOffload::Parts ExpertOffload::split(int64_t layer, const torch::Tensor& offs) const {
  const auto ends = offs.to(torch::kCPU, torch::kInt64);
  Parts parts;
  int64_t begin = 0;
  for (int64_t expert = 0; expert < ends.numel(); ++expert) {
    const int64_t end = ends.data_ptr<int64_t>()[expert];
    const Part part{expert, begin, end - begin};
    begin = end;
    if (part.rows == 0) continue;
    const bool here = resident_.at(static_cast<size_t>(layer))[static_cast<size_t>(expert)].down.defined();
    (here ? parts.resident : part.rows <= cpu_rows_ ? parts.on_cpu : parts.fetched).push_back(part);
  }
  return parts;
}

void ExpertOffload::count(const Parts& parts) {
  for (const Part& part : parts.resident) hits_ += part.rows;
  for (const auto* missed : {&parts.fetched, &parts.on_cpu})
    for (const Part& part : *missed) misses_ += part.rows;
}

void ExpertOffload::fetch(size_t buffer, const ExpertWeights& expert) {
  arena_->fetch(static_cast<int>(buffer), expert.gate_up, staging_[buffer].gate_up);
  arena_->fetch(static_cast<int>(buffer), expert.down, staging_[buffer].down);
  bytes_ += expert.gate_up.nbytes() + expert.down.nbytes();
}

torch::Tensor ExpertOffload::run(int64_t layer, const torch::Tensor& x, const torch::Tensor& topk_weights,
                                 const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
                                 const torch::Tensor& down_proj) {
  const ExpertWeights all{gate_up_proj, down_proj};
  const auto [rows, offs, row_map] = ops::moe_permute(x, topk_ids, gate_up_proj.size(0));
  const Parts parts = split(layer, offs);
  count(parts);
  auto y = torch::zeros_like(rows);  // [M,H]
  const auto put = [&y](const Part& part, const torch::Tensor& result) {
    y.narrow(0, part.begin, part.rows).copy_(result);
  };
  // Everything that the device can do is launched before the CPU begins to compute.
  const torch::Tensor host_rows = parts.on_cpu.empty() ? torch::Tensor() : rows.to(torch::kCPU);
  if (!parts.fetched.empty()) fetch(0, of_expert(all, parts.fetched[0].expert));
  for (const Part& part : parts.resident) {
    const auto& expert = resident_[static_cast<size_t>(layer)][static_cast<size_t>(part.expert)];
    put(part, compute(rows.narrow(0, part.begin, part.rows), expert));
  }
  for (size_t i = 0; i < parts.fetched.size(); ++i) {
    if (i + 1 < parts.fetched.size()) fetch((i + 1) % 2, of_expert(all, parts.fetched[i + 1].expert));
    const Part& part = parts.fetched[i];
    const int buffer = static_cast<int>(i % 2);
    arena_->await(buffer);
    put(part, compute(rows.narrow(0, part.begin, part.rows), staging_[buffer]));
    arena_->release(buffer);
  }
  for (const Part& part : parts.on_cpu)
    put(part, compute(host_rows.narrow(0, part.begin, part.rows), of_expert(all, part.expert)));
  return ops::moe_unpermute(y, topk_weights, row_map);
}

}  // namespace mixtral
