// Experts of which a device holds only some. Which ones never changes, and weights are only read, so nothing is copied
// back. The others are computed by the CPU where they lie when they have few rows, and else fetched through two staging
// buffers: while one expert is computed with, the next one comes.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <utility>
#include <vector>

#include "../model/config.h"
#include "../model/expert_runner.h"
#include "device_arena.h"

namespace mixtral {

// [L][E]: counts of tokens, or whether an expert is on the device.
using ExpertTable = std::vector<std::vector<int64_t>>;

// From JSON as `mixtral route --counts` takes it: {"topk_assignments": {name: [[E counts], one a layer]}}; the names
// are added up. Throws LoadError.
ExpertTable read_expert_counts(const std::filesystem::path& file);

// Puts `count` experts on the device: those with the largest counts, of equals first those with the smaller index; or,
// without counts, one of each layer in turn, so that every layer misses as often. Throws std::invalid_argument for
// counts of another number of layers or experts.
ExpertTable place_experts(const Config& config, int64_t count, const ExpertTable& counts = {});

// Both matrices of an expert, or of all experts of a layer: [E,2I,H] and [E,H,I], or packed.
struct ExpertWeights {
  torch::Tensor gate_up, down;
};

class ExpertOffload : public ExpertRunner {
 public:
  // layers: of all experts, on the CPU. cpu_rows: with more rows an expert is fetched; -1: more than that the CPU takes
  // longer for than a copy does, measured here. Throws what DeviceArena::allocate does.
  ExpertOffload(std::unique_ptr<DeviceArena> arena, const std::vector<ExpertWeights>& layers,
                const ExpertTable& on_device, int64_t cpu_rows, torch::ScalarType dtype);

  torch::Tensor run(int64_t layer, const torch::Tensor& x, const torch::Tensor& topk_weights,
                    const torch::Tensor& topk_ids, const torch::Tensor& gate_up_proj,
                    const torch::Tensor& down_proj) override;
  ExpertCounts counts() const override { return {hits_, misses_, bytes_}; }
  int64_t cpu_rows() const { return cpu_rows_; }
  // [L][E]: the copies on the device; undefined where there is none.
  const std::vector<std::vector<ExpertWeights>>& on_device() const { return resident_; }

 private:
  // The rows of one expert, of those that are sorted by expert.
  struct Part {
    int64_t expert, begin, rows;
  };
  struct Parts {
    std::vector<Part> resident, fetched, on_cpu;
  };
  Parts split(int64_t layer, const torch::Tensor& offs) const;
  void count(const Parts& parts);
  void fetch(size_t buffer, const ExpertWeights& expert);
  int64_t measure_cpu_rows(const ExpertWeights& layer, torch::ScalarType dtype);

  const std::unique_ptr<DeviceArena> arena_;
  std::vector<std::vector<ExpertWeights>> resident_;  // [L][E], on the device; undefined: not there
  ExpertWeights staging_[2];
  int64_t cpu_rows_;
  std::atomic<int64_t> hits_{0}, misses_{0};
  std::atomic<uint64_t> bytes_{0};
};

}  // namespace mixtral
