// The table of parameters against the modules that allocate from it, and what is counted from it.
#include <gtest/gtest.h>

#include <tuple>

#include "model/parameters.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

TEST(Parameters, AreThoseThatTheModelRegisters) {
  for (const int64_t experts : {0, 4}) {
    for (const bool tied : {false, true}) {
      for (const bool router_in_f32 : {false, true}) {
        Config config = tiny_config(experts);
        config.tie_word_embeddings = tied;
        config.router_in_f32 = router_in_f32;
        const MixtralImpl model(config, torch::kBFloat16, torch::kMeta);
        const auto registered = model.named_parameters();
        const auto table = model_parameters(config);
        ASSERT_EQ(registered.size(), table.size());
        for (size_t i = 0; i < table.size(); ++i) {
          const torch::Tensor& tensor = registered[i].value();
          EXPECT_EQ(registered[i].key(), table[i].name);
          EXPECT_EQ(tensor.sizes().vec(), table[i].shape) << table[i].name;
          EXPECT_EQ(tensor.scalar_type() == torch::kFloat32, table[i].is_f32) << table[i].name;
        }
      }
    }
  }
}

TEST(Parameters, HaveTheShapesOfMixtral8x7B) {
  Config config = mixtral_8x7b();
  EXPECT_EQ(config.total_parameters(), 46702792704);   // "46.7B" (Jiang et al., "Mixtral of Experts", 2024)
  EXPECT_EQ(config.active_parameters(), 12879925248);  // "12.9B"
  config.tie_word_embeddings = true;
  EXPECT_EQ(config.total_parameters(), 46702792704 - 32000 * 4096);
}

TEST(Parameters, OnlyMatricesOfWholeBlocksArePacked) {
  Config config = packable_config();
  config.vocab_size = 129;
  for (const Parameter& parameter : model_parameters(config)) {
    const bool is_projection = parameter.name.find("_proj") != std::string::npos;
    EXPECT_EQ(parameter.packing(Packing::kInt4), is_projection ? Packing::kInt4 : Packing::kNone) << parameter.name;
  }
  config.vocab_size = 128;
  for (const Parameter& parameter : model_parameters(config)) {
    const bool is_lm_head = parameter.name == "lm_head";
    EXPECT_TRUE(!is_lm_head || parameter.packing(Packing::kFloat) == Packing::kFloat);
  }
}

}  // namespace
}  // namespace mixtral
