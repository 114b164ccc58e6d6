// Experts of which a device holds only some. The device is memory of this machine (checkpoint/device_arena.h).
#include <gtest/gtest.h>

#include <random>
#include <stdexcept>

#include "checkpoint/expert_offload.h"
#include "checkpoint/from_pretrained.h"
#include "checkpoint/save.h"
#include "checkpoint_files.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

std::vector<ExpertWeights> experts_of(const Mixtral& model) {
  const auto parameters = model->named_parameters();
  std::vector<ExpertWeights> layers;
  for (int64_t n = 0; n < model->config().num_layers; ++n) {
    const std::string path = "layers." + std::to_string(n) + ".moe.";
    layers.push_back({parameters[path + "gate_up_proj"], parameters[path + "down_proj"]});
  }
  return layers;
}

std::shared_ptr<ExpertOffload> offload(Mixtral& model, const ExpertTable& on_device, int64_t cpu_rows) {
  const auto runner =
      std::make_shared<ExpertOffload>(make_arena(torch::kCPU), experts_of(model), on_device, cpu_rows, model->dtype());
  model->set_expert_runner(runner);
  return runner;
}

int64_t sum(const ExpertTable& table) {
  int64_t sum = 0;
  for (const auto& layer : table)
    for (const int64_t value : layer) sum += value;
  return sum;
}

TEST(ExpertOffload, EveryPlacementAndPolicyGivesTheBitsOfTheWholeModel) {
  const Config config = packable_config(/*num_experts=*/8);
  const auto ids = random_ids(40, config.vocab_size, 2);
  for (const Packing packing : {Packing::kNone, Packing::kFloat, Packing::kInt8, Packing::kFp8, Packing::kInt4}) {
    const auto dtype = is_quantized(packing) ? torch::kBFloat16 : torch::kFloat32;
    Mixtral model = tiny_model(config, dtype);
    if (packing != Packing::kNone) model = packed_model(model, packing);
    const torch::Tensor expected = whole(model, ids).to(torch::kFloat32);
    const torch::Tensor expected_chunks = chunked(model, ids, 1).to(torch::kFloat32);
    for (const int64_t placed : {0, 1, 7, 12, 16}) {
      for (const int64_t cpu_rows : {0, 8, 1000}) {
        const auto runner = offload(model, place_experts(config, placed), cpu_rows);
        EXPECT_TRUE(same_bits(whole(model, ids).to(torch::kFloat32), expected)) << placed << " " << cpu_rows;
        ExpertCounts counts = runner->counts();
        EXPECT_EQ(counts.hits + counts.misses, 2 * 2 * 40);
        EXPECT_EQ(counts.hits == 0, placed == 0);
        EXPECT_EQ(counts.misses == 0, placed == 16);
        EXPECT_EQ(counts.bytes > 0, placed < 16 && cpu_rows < 1000);
        EXPECT_TRUE(same_bits(chunked(model, ids, 1).to(torch::kFloat32), expected_chunks));
        counts = runner->counts();
        EXPECT_EQ(counts.hits + counts.misses, 2 * 2 * 2 * 40);
      }
    }
  }
}

TEST(ExpertOffload, RandomPlacementsGiveTheTokensOfTheWholeModel) {
  Config config = packable_config(/*num_experts=*/8);
  config.num_layers = 3;
  constexpr int64_t kPrompt = 9, kTokens = 16;
  std::mt19937 random(1);
  for (const Packing packing : {Packing::kFloat, Packing::kInt8}) {
    Mixtral model = packed_model(tiny_model(config, torch::kBFloat16), packing);
    const auto greedy = [&] {
      auto ids = random_ids(kPrompt, config.vocab_size, 2);
      for (int64_t n = 0; n < kTokens; ++n) {
        const auto logits = whole(model, ids);
        ids.push_back(logits[logits.size(0) - 1].argmax().item<int64_t>());
      }
      return ids;
    };
    const auto expected = greedy();
    int64_t choices = 0;
    for (int64_t n = 0; n < kTokens; ++n) choices += (kPrompt + n) * config.num_layers * config.top_k;
    for (int round = 0; round < 4; ++round) {
      ExpertTable on_device(3, std::vector<int64_t>(8));
      for (auto& layer : on_device)
        for (int64_t& here : layer) here = static_cast<int64_t>(random() % 2);
      for (const int64_t cpu_rows : {0, 2, 1000}) {  // fetch all; fetch experts of many tokens; compute all on the CPU
        const auto runner = offload(model, on_device, cpu_rows);
        EXPECT_EQ(greedy(), expected) << "round " << round << ", " << cpu_rows << " rows on the CPU";
        const ExpertCounts counts = runner->counts();
        EXPECT_EQ(counts.hits + counts.misses, choices);
        EXPECT_GT(counts.hits, 0);
        EXPECT_GT(counts.misses, 0);
        EXPECT_EQ(counts.bytes > 0, cpu_rows < 1000);
      }
    }
    model->set_expert_runner(nullptr);
  }
}

TEST(ExpertOffload, TokensWithFewerExpertsAreComputedToo) {
  const Config config = packable_config(/*num_experts=*/8);
  Mixtral model = tiny_model(config);
  Batch batch = packed_batch({random_ids(6, config.vocab_size, 2)}, torch::kCPU);
  batch.rows_by_experts[1] = torch::tensor({0, 3}, torch::kInt64);
  batch.rows_by_experts[3] = torch::tensor({1, 2, 4, 5}, torch::kInt64);
  const auto expected = model->hidden_states(batch);
  const auto runner = offload(model, place_experts(config, 5), 1);
  EXPECT_TRUE(same_bits(model->hidden_states(batch), expected));
  EXPECT_EQ(runner->counts().hits + runner->counts().misses, 2 * (2 * 1 + 4 * 3));
}

TEST(ExpertOffload, MeasuresWhatTheCpuIsToCompute) {
  Mixtral model = packed_model(tiny_model(packable_config()), Packing::kFloat);
  const auto ids = random_ids(20, model->config().vocab_size, 2);
  const auto expected = whole(model, ids);
  const auto runner = offload(model, place_experts(model->config(), 3), -1);
  EXPECT_GE(runner->cpu_rows(), 0);
  EXPECT_TRUE(same_bits(whole(model, ids), expected));
}

TEST(PlaceExperts, GivesEveryLayerAsManyWithoutCounts) {
  const Config config = packable_config(/*num_experts=*/4);
  EXPECT_EQ(place_experts(config, 5), (ExpertTable{{1, 1, 1, 0}, {1, 1, 0, 0}}));
  EXPECT_EQ(sum(place_experts(config, 100)), 8);
  EXPECT_EQ(sum(place_experts(config, -1)), 0);
}

TEST(PlaceExperts, TakesTheMostUsedOnes) {
  const Config config = packable_config(/*num_experts=*/4);
  const ExpertTable counts = {{1, 9, 2, 8}, {3, 0, 7, 3}};
  EXPECT_EQ(place_experts(config, 4, counts), (ExpertTable{{0, 1, 0, 1}, {1, 0, 1, 0}}));
  EXPECT_THROW(place_experts(config, 4, {{1, 2, 3, 4}}), std::invalid_argument);
  EXPECT_THROW(place_experts(config, 4, {{1, 2, 3, 4}, {1, 2, 3}}), std::invalid_argument);
}

TEST(PlaceExperts, ReadsCountsAndAddsThemUp) {
  const testing::TempFolder folder;
  const auto counts = [&](const std::string& text) {
    testing::write_file(folder / "counts.json", text);
    return read_expert_counts(folder / "counts.json");
  };
  EXPECT_EQ(counts(R"({"layers": [0], "topk_assignments": {"prose": [[1, 2], [3, 4]], "code": [[10, 0], [0, 5]]}})"),
            (ExpertTable{{11, 2}, {3, 9}}));
  for (const char* wrong :
       {"{}", R"({"topk_assignments": {}})", R"({"topk_assignments": {"a": [1, 2]}})",
        R"({"topk_assignments": {"a": [[1, -2]]}})", R"({"topk_assignments": {"a": [[1, 2]], "b": [[1, 2], [3, 4]]}})",
        R"({"topk_assignments": {"a": [[1, 2]], "b": [[1, 2, 3]]}})"}) {
    testing::expect_load_error([&] { counts(wrong); }, "topk_assignments: must be an object of");
  }
}

TEST(ExpertOffload, NeedsADeviceOfItsOwn) {
  const testing::TempFolder folder;
  save_packed(*packed_model(tiny_model(packable_config()), Packing::kFloat), folder.path(), folder / "out");
  LoadOptions options;
  options.gpu_memory = 1 << 30;
  try {
    from_pretrained(folder / "out", options);
    ADD_FAILURE() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "gpu_memory needs device cuda, got cpu");
  }
}

}  // namespace
}  // namespace mixtral
