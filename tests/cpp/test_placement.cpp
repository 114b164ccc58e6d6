// Every row and column of every parameter against the ranks that should hold it, told head by head and expert by
// expert.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <stdexcept>

#include "model/parameters.h"
#include "model/placement.h"

namespace mixtral {
namespace {

struct Layout {
  int tensor_size, stages;
  bool expert_parallel;

  Placement of(int rank) const { return Placement::of_rank(rank, tensor_size, stages, expert_parallel); }
  int world_size() const { return tensor_size * stages; }
};

Config config_of(int64_t heads, int64_t kv_heads, int64_t layers, int64_t experts) {
  Config config;
  config.hidden_size = 48;
  config.intermediate_size = 24;
  config.num_layers = layers;
  config.num_heads = heads;
  config.num_kv_heads = kv_heads;
  config.head_dim = 4;
  config.vocab_size = 384;
  config.num_experts = experts;
  config.top_k = experts > 0 ? 1 : 0;
  return config;
}

// A configuration that `layout` can cut.
Config random_config(const Layout& layout, std::mt19937& random) {
  const auto pick = [&](int64_t least, int64_t most) { return std::uniform_int_distribution(least, most)(random); };
  const int64_t n = layout.tensor_size, group = pick(1, 3);
  const int64_t kv_heads = pick(0, 1) ? n * pick(1, 2) : n % 2 == 0 && pick(0, 1) ? n / 2 : 1;
  const int64_t heads = kv_heads % n == 0 ? kv_heads * group : n * group;
  Config config = config_of(heads, kv_heads, layout.stages + pick(0, 3), pick(0, 1) ? n * pick(1, 3) : 0);
  config.hidden_size = n * pick(1, 9);
  config.intermediate_size = n * pick(1, 9);
  config.vocab_size = 32 * n * pick(1, 3) + (pick(0, 1) ? 1 : 0);
  config.head_dim = 2 * pick(1, 3);
  config.tie_word_embeddings = pick(0, 1);
  config.select_bias = config.is_moe() && pick(0, 1);
  return config;
}

// The tensor ranks that hold row `row`, column `column` of a parameter of one of their layers.
std::set<int> expected_tensor_ranks(const std::string& name, int64_t row, int64_t column, const Config& config,
                                    const Layout& layout) {
  const int64_t n = layout.tensor_size;
  const auto ends_in = [&](const std::string& end) {
    return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
  };
  std::set<int> ranks;
  for (int r = 0; r < layout.tensor_size; ++r) {
    bool holds = true;
    if (ends_in("qkv_proj")) {
      const int64_t head = row / config.head_dim;
      if (head < config.num_heads) {
        holds = head / (config.num_heads / n) == r;
      } else {  // a key or value head is where a query head is that reads it
        const int64_t kv_head = (head - config.num_heads) % config.num_kv_heads;
        holds = false;
        for (int64_t q = 0; q < config.num_heads; ++q) {
          const bool reads = q / (config.num_heads / config.num_kv_heads) == kv_head;
          holds = holds || (reads && q / (config.num_heads / n) == r);
        }
      }
    } else if (ends_in("o_proj")) {
      holds = row / (config.hidden_size / n) == r;
    } else if (ends_in("gate_up_proj") || ends_in("down_proj")) {
      const bool gate_up = ends_in("gate_up_proj");
      const int64_t I = config.intermediate_size, expert = row / (gate_up ? 2 * I : config.hidden_size);
      const int64_t neuron = gate_up ? row % I : column;
      if (config.is_moe() && layout.expert_parallel) {
        holds = expert / (config.num_experts / n) == r;
      } else if (gate_up || !layout.expert_parallel) {
        holds = neuron / (I / n) == r;
      } else {
        holds = row / (config.hidden_size / n) == r;
      }
    } else if (name == "lm_head" && config.vocab_size % (32 * n) == 0) {
      holds = row / (config.vocab_size / n) == r;
    }
    if (holds) ranks.insert(r);
  }
  return ranks;
}

std::set<int> expected_stages(const Parameter& parameter, const Config& config, const Layout& layout) {
  const int last = layout.stages - 1;
  if (parameter.name == "norm" || parameter.name == "lm_head") return {last};
  if (parameter.name == "embed_tokens") {
    return config.tie_word_embeddings ? std::set<int>{0, last} : std::set<int>{0};
  }
  const int64_t each = config.num_layers / layout.stages, more = config.num_layers % layout.stages;
  const int64_t n = parameter.layer;
  // With as many layers in every stage it is told by division; else it is one stage, and they differ by one at most.
  if (more == 0) return {static_cast<int>(n / each)};
  for (int s = 0; s < layout.stages; ++s) {
    const Placement placement = layout.of((last - s) * layout.tensor_size);
    if (placement.first_layer(config) <= n && n < placement.end_layer(config)) return {s};
  }
  return {};
}

void expect_held_where_expected(const Config& config, const Layout& layout) {
  // By parameter, and by row and column of it, the ranks that hold it.
  std::map<std::string, std::map<std::pair<int64_t, int64_t>, std::set<int>>> held;
  for (int rank = 0; rank < layout.world_size(); ++rank) {
    const Placement placement = layout.of(rank);
    ASSERT_EQ(placement.rank(), rank);
    placement.check(config);
    for (const Parameter& parameter : placed_parameters(config, placement)) {
      const ParameterShard shard = shard_of(parameter, config, placement);
      auto& held_here = held[parameter.name];
      int64_t rows = 0, size = 1, end = 0;
      for (const RowRange& range : shard.rows) {
        ASSERT_LE(end, range.begin) << parameter.name;  // ascending, and no row twice
        ASSERT_LT(range.begin, range.end) << parameter.name;
        end = range.end;
        rows += range.end - range.begin;
        for (int64_t row = range.begin; row < range.end; ++row)
          for (int64_t c = 0; c < shard.columns; ++c) held_here[{row, shard.first_column + c}].insert(rank);
      }
      for (const int64_t d : shard.shape) size *= d;
      EXPECT_EQ(size, rows * shard.columns) << parameter.name;
      EXPECT_EQ(shard.shape.back(), shard.columns) << parameter.name;
      EXPECT_EQ(shard.shape.size(), parameter.shape.size()) << parameter.name;
      if (parameter.name.find("qkv_proj") != std::string::npos) {
        EXPECT_EQ(shard.shape[0], (placement.num_heads(config) + 2 * placement.num_kv_heads(config)) * config.head_dim);
      }
      if (parameter.is_expert) {
        EXPECT_EQ(shard.shape[0], placement.num_experts(config));
        EXPECT_EQ(shard.rows[0].begin / (parameter.size() / parameter.shape[0] / parameter.shape[2]),
                  placement.first_expert(config));
      }
      if (parameter.cut == Cut::kGateUp) {
        EXPECT_EQ(shard.shape[1], 2 * placement.intermediate_size(config));
      }
    }
  }
  for (const Parameter& parameter : model_parameters(config)) {
    const std::set<int> stages = expected_stages(parameter, config, layout);
    ASSERT_FALSE(stages.empty()) << parameter.name;
    const int64_t cols = parameter.shape.back();
    auto& held_here = held[parameter.name];
    for (int64_t row = 0; row < parameter.size() / cols; ++row) {
      for (int64_t column = 0; column < cols; ++column) {
        std::set<int> expected;
        for (const int s : stages)
          for (const int r : expected_tensor_ranks(parameter.name, row, column, config, layout))
            expected.insert((layout.stages - 1 - s) * layout.tensor_size + r);
        ASSERT_EQ((held_here[{row, column}]), expected) << parameter.name << " row " << row << " column " << column
                                                        << " over " << layout.tensor_size << " x " << layout.stages;
      }
    }
  }
}

TEST(Placement, EveryRowIsWithTheRanksThatNeedIt) {
  std::mt19937 random(1);
  for (const int tensor_size : {1, 2, 3, 4})
    for (const int stages : {1, 2, 3})
      for (const bool expert_parallel : {false, true})
        for (int i = 0; i < 4; ++i) {
          const Layout layout{tensor_size, stages, expert_parallel};
          expect_held_where_expected(random_config(layout, random), layout);
          if (HasFatalFailure()) return;
        }
}

TEST(Placement, OneRankHoldsTheWholeModel) {
  for (const int64_t experts : {0, 4}) {
    const Config config = config_of(4, 2, 2, experts);
    for (const bool expert_parallel : {false, true}) {
      const Placement whole = Placement::of_rank(0, 1, 1, expert_parallel);
      EXPECT_TRUE(whole.is_whole() && whole.is_first_stage() && whole.is_last_stage());
      const auto placed = placed_parameters(config, whole), all = model_parameters(config);
      ASSERT_EQ(placed.size(), all.size());
      for (size_t i = 0; i < all.size(); ++i) {
        EXPECT_EQ(placed[i].name, all[i].name);
        EXPECT_EQ(shard_of(all[i], config, whole).shape, all[i].shape);
      }
    }
  }
}

TEST(Placement, StagesDifferByAtMostOneLayerAndTheLastOneHasNotMore) {
  for (int64_t layers = 1; layers <= 20; ++layers) {
    const Config config = config_of(4, 2, layers, 4);
    for (int stages = 1; stages <= layers; ++stages) {
      int64_t next = 0;
      for (int s = 0; s < stages; ++s) {
        const Placement placement{1, 0, stages, s};
        EXPECT_EQ(placement.first_layer(config), next);
        next = placement.end_layer(config);
        const int64_t own = next - placement.first_layer(config), least = layers / stages;
        EXPECT_TRUE(own == least || (own == least + 1 && layers % stages != 0 && (s + 1 < stages || stages == 1)));
      }
      EXPECT_EQ(next, layers);
    }
  }
}

TEST(Placement, TheLastStageComesFirst) {
  const Layout layout{2, 3, true};
  EXPECT_EQ(layout.of(0).stage, 2);
  EXPECT_EQ(layout.of(5).stage, 0);
  EXPECT_EQ(layout.of(5).tensor_rank, 1);
  EXPECT_EQ(layout.of(5).name(), "tensor 1 of 2, stage 0 of 3");
  EXPECT_EQ(layout.of(5).stage_ranks(0), (std::vector<int>{4, 5}));
  EXPECT_EQ(layout.of(5).stage_ranks(2), (std::vector<int>{0, 1}));
}

TEST(Placement, CountsKeysAndValuesOfItsOwnLayersAndHeads) {
  const Config config = config_of(8, 2, 3, 4);  // 3 layers of 2 heads of 4, keys and values
  EXPECT_EQ((Placement{1, 0, 1, 0}.kv_bytes_per_token(config, 2)), config.kv_bytes_per_token(2));
  EXPECT_EQ((Placement{2, 1, 2, 0}.kv_bytes_per_token(config, 2)), 2 * 2 * 1 * 4 * 2);
  EXPECT_EQ((Placement{8, 1, 2, 1}.kv_bytes_per_token(config, 2)), 1 * 2 * 1 * 4 * 2);  // the head is on four ranks
}

std::string error_of(const Config& config, const Layout& layout) {
  try {
    layout.of(0).check(config);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(Placement, ErrorsNameBothNumbers) {
  const Config config = config_of(6, 2, 2, 8);
  EXPECT_EQ(error_of(config, {2, 2, true}), "");
  EXPECT_EQ(error_of(config, {4, 1, true}), "tensor_parallel_size must divide num_heads 6, got 4");
  EXPECT_EQ(error_of(config, {1, 4, true}), "pipeline_parallel_size must be at most num_layers 2, got 4");
  EXPECT_EQ(error_of(config_of(6, 3, 2, 8), {3, 1, true}), "tensor_parallel_size must divide num_experts 8, got 3");
  EXPECT_EQ(error_of(config_of(6, 3, 2, 8), {3, 1, false}), "");  // each expert is cut
  EXPECT_EQ(error_of(config, {3, 1, true}),
            "tensor_parallel_size must divide num_kv_heads 2 or be a multiple of it, got 3");
  Config odd = config;
  odd.intermediate_size = 25;
  EXPECT_EQ(error_of(odd, {2, 1, true}), "");  // experts are whole
  EXPECT_EQ(error_of(odd, {2, 1, false}), "tensor_parallel_size must divide intermediate_size 25, got 2");
  odd.num_experts = odd.top_k = 0;
  EXPECT_EQ(error_of(odd, {2, 1, true}), "tensor_parallel_size must divide intermediate_size 25, got 2");
  odd.hidden_size = 49;
  EXPECT_EQ(error_of(odd, {2, 1, true}), "tensor_parallel_size must divide hidden_size 49, got 2");
  EXPECT_EQ(error_of(config, {0, 1, true}), "tensor_parallel_size must be in [1, 4096], got 0");
  EXPECT_EQ(error_of(config, {1, 4097, true}), "pipeline_parallel_size must be in [1, 4096], got 4097");
  EXPECT_THROW(Placement::of_rank(4, 2, 2, true), std::invalid_argument);
  EXPECT_THROW(Placement::of_rank(-1, 2, 2, true), std::invalid_argument);
}

}  // namespace
}  // namespace mixtral
