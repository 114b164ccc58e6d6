// What is said of `gpu_memory` before loading, against what loading does with memory of the CPU in the place of a
// GPU's.
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "checkpoint/from_pretrained.h"
#include "checkpoint/offload_plan.h"
#include "checkpoint/save.h"
#include "checkpoint_files.h"
#include "engine/offload_rates.h"
#include "model/memory.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

constexpr int64_t kMiB = 1 << 20;

std::shared_ptr<ExpertOffload> runner_of(const Mixtral& model) {
  return std::dynamic_pointer_cast<ExpertOffload>(model->expert_runner());
}

// A folder with a model of 2 layers of 4 experts.
class OffloadedFolder {
 public:
  explicit OffloadedFolder(Packing packing) : type_{"bfloat16", packing} {
    const Mixtral model = packed_model(tiny_model(packable_config(), torch::kBFloat16), packing);
    save_packed(*model, temporary_.path(), folder());
  }

  std::filesystem::path folder() const { return temporary_ / "out"; }
  OffloadPlan plan(int64_t gpu_memory, const std::filesystem::path& counts = {}) const {
    return plan_offload(packable_config(), type_, "cpu", gpu_memory, counts);
  }
  Mixtral load(int64_t gpu_memory, const std::filesystem::path& counts = {}) const {
    LoadOptions options;
    options.gpu_memory = gpu_memory;
    options.simulate_gpu = true;
    options.routing_counts = counts;
    return from_pretrained(folder(), options);
  }
  // That holds so many experts and no more.
  int64_t memory_for(int64_t experts) const {
    const OffloadPlan all = plan(64 * kMiB);
    return static_cast<int64_t>(all.others + all.activations + all.staging() +
                                static_cast<double>(experts) * all.expert);
  }
  std::filesystem::path write_counts(const ExpertTable& counts) const {
    std::string layers;
    for (const auto& layer : counts) {
      layers += (layers.empty() ? "[" : ", [") + std::to_string(layer.at(0));
      for (size_t expert = 1; expert < layer.size(); ++expert) layers += ", " + std::to_string(layer[expert]);
      layers += "]";
    }
    testing::write_file(temporary_ / "counts.json", R"({"topk_assignments": {"text": [)" + layers + "]}}");
    return temporary_ / "counts.json";
  }

 private:
  const testing::TempFolder temporary_;
  const WeightType type_;
};

std::string out_of_memory_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const OutOfMemory& error) {
    return error.what();
  }
  return "no error";
}

TEST(OffloadPlan, IsWhatLoadingPlaces) {
  for (const Packing packing : {Packing::kFloat, Packing::kInt8, Packing::kFp8, Packing::kInt4}) {
    const OffloadedFolder folder(packing);
    for (const int64_t experts : {0, 1, 3, 4, 8}) {
      const int64_t memory = folder.memory_for(experts);
      const OffloadPlan plan = folder.plan(memory);
      EXPECT_EQ(plan.num_on_device(), experts);
      EXPECT_EQ(plan.num_experts(), 8);
      const Mixtral model = folder.load(memory);
      double placed = 0, others = 0;
      for (size_t layer = 0; layer < 2; ++layer) {
        for (size_t expert = 0; expert < 4; ++expert) {
          const ExpertWeights& weights = runner_of(model)->on_device().at(layer).at(expert);
          EXPECT_EQ(weights.down.defined(), plan.on_device[layer][expert] != 0) << layer << " " << expert;
          if (weights.down.defined()) placed += static_cast<double>(weights.gate_up.nbytes() + weights.down.nbytes());
        }
      }
      for (const auto& item : model->named_parameters())
        if (item.key().find("proj") == std::string::npos || item.key().find("moe") == std::string::npos)
          others += static_cast<double>(item.value().nbytes());
      EXPECT_EQ(plan.on_device_bytes(), placed);
      EXPECT_EQ(plan.others, others);
    }
    EXPECT_EQ(folder.plan(folder.memory_for(4) - 1).num_on_device(), 3);
    EXPECT_EQ(folder.plan(1024 * kMiB).num_on_device(), 8);
  }
}

TEST(OffloadPlan, TooLittleMemoryIsTheErrorOfLoading) {
  const OffloadedFolder folder(Packing::kInt8);
  const int64_t least = folder.memory_for(0);
  EXPECT_EQ(folder.plan(least).num_on_device(), 0);
  const std::string message = out_of_memory_of([&] { folder.plan(least - 1); });
  EXPECT_NE(message.find("gpu_memory must be at least"), std::string::npos) << message;
  EXPECT_EQ(out_of_memory_of([&] { folder.load(least - 1); }), message);
}

TEST(OffloadPlan, WithEvenRoutingHitsAreTheShareOfTheExperts) {
  const OffloadedFolder folder(Packing::kFloat);
  for (const int64_t experts : {0, 3, 8}) {
    const OffloadPlan plan = folder.plan(folder.memory_for(experts));
    EXPECT_FALSE(plan.by_counts);
    EXPECT_DOUBLE_EQ(plan.hits, 2 * 2 * static_cast<double>(experts) / 8);
    EXPECT_DOUBLE_EQ(plan.hits + plan.misses, 2 * 2);
  }
}

TEST(OffloadPlan, CountsSayHowOftenEachLayerHits) {
  const OffloadedFolder folder(Packing::kFloat);
  // 8 and 9 of the first layer; 20 choices there. The second layer was never counted, and counts as even.
  const auto file = folder.write_counts({{1, 9, 2, 8}, {0, 0, 0, 0}});
  const OffloadPlan plan = folder.plan(folder.memory_for(2), file);
  EXPECT_TRUE(plan.by_counts);
  EXPECT_EQ(plan.on_device, (ExpertTable{{0, 1, 0, 1}, {0, 0, 0, 0}}));
  EXPECT_DOUBLE_EQ(plan.hits, 2 * 17.0 / 20);
  EXPECT_DOUBLE_EQ(folder.plan(folder.memory_for(5), file).hits, 2 * 1.0 + 2 * 1.0 / 4);
  EXPECT_THROW(folder.plan(folder.memory_for(2), folder.write_counts({{1, 9, 2}})), std::invalid_argument);
}

TEST(OffloadPlan, CountsOfATextForecastItsHits) {
  const OffloadedFolder folder(Packing::kFloat);
  const auto ids = random_ids(50, packable_config().vocab_size, 3);
  const auto hits_with = [&](int64_t experts, const ExpertTable& counts) {
    Mixtral model = folder.load(folder.memory_for(experts), folder.write_counts(counts));
    whole(model, ids);
    const ExpertCounts found = runner_of(model)->counts();
    EXPECT_EQ(found.hits + found.misses, 2 * 2 * 50);
    return found.hits;
  };
  ExpertTable counted(2, std::vector<int64_t>(4));
  for (size_t i = 0; i < 8; ++i) {  // the expert that is there alone has all hits
    ExpertTable only(2, std::vector<int64_t>(4));
    only[i / 4][i % 4] = 1;
    counted[i / 4][i % 4] = hits_with(1, only);
  }
  for (const int64_t experts : {1, 3, 5}) {
    const OffloadPlan plan = folder.plan(folder.memory_for(experts), folder.write_counts(counted));
    EXPECT_NEAR(plan.hits * 50, static_cast<double>(hits_with(experts, counted)), 1e-9);
    EXPECT_GT(plan.hits, folder.plan(folder.memory_for(experts)).hits);  // no routing is even
  }
}

TEST(OffloadPlan, NeedsExperts) {
  const WeightType type{"float32", Packing::kNone};
  EXPECT_THROW(plan_offload(packable_config(/*num_experts=*/0), type, "cpu", 64 * kMiB), std::invalid_argument);
}

// How fast is for benchmarks; that every part of a token is there is not.
TEST(OffloadRates, AreOfEveryPartOfAToken) {
  Config config = packable_config();
  const WeightType type{"bfloat16", Packing::kFloat};
  int64_t checks = 0;
  const OffloadRates rates = measure_offload(config, type, "cpu", [&] { ++checks; });
  EXPECT_TRUE(rates.has_device);
  for (const double seconds : {rates.fixed, rates.hit, rates.miss}) {
    EXPECT_GT(seconds, 0);
    EXPECT_LT(seconds, 1);
  }
  EXPECT_GT(checks, 0);
  EXPECT_THROW(measure_offload(config, type, "cpu", [] { throw std::runtime_error("ended"); }), std::runtime_error);
}

TEST(OffloadRates, WithoutADeviceOnlyMissesAreKnown) {
  if (at::hasCUDA()) GTEST_SKIP() << "there is a device";
  const OffloadRates rates = measure_offload(packable_config(), {"bfloat16", Packing::kInt8}, "cuda", [] {});
  EXPECT_FALSE(rates.has_device);
  EXPECT_EQ(rates.fixed, 0);
  EXPECT_EQ(rates.hit, 0);
  EXPECT_GT(rates.miss, 0);
}

}  // namespace
}  // namespace mixtral
