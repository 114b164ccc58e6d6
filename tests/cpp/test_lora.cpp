#include "checkpoint/lora.h"
#include "checkpoint_files.h"
#include "checkpoint_tensors.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

using testing::safetensors;
using testing::TempFolder;
using testing::write_file;

// Rank 2 on q_proj and on both expert parameters of layer 0, all ones.
std::string adapter_file(const Config& config) {
  const std::string layer = "base_model.model.model.layers.0.";
  const int64_t experts = 2 * config.num_experts, hidden = config.hidden_size, inner = config.intermediate_size;
  const std::vector<std::pair<std::string, std::vector<int64_t>>> tensors = {
      {layer + "mlp.experts.base_layer.lora_A.weight", {experts, hidden}},
      {layer + "mlp.experts.base_layer.lora_B.weight", {2 * inner, experts}},
      {layer + "mlp.experts.lora_A.weight", {experts, inner}},
      {layer + "mlp.experts.lora_B.weight", {hidden, experts}},
      {layer + "self_attn.q_proj.lora_A.weight", {2, hidden}},
      {layer + "self_attn.q_proj.lora_B.weight", {hidden, 2}}};
  std::string header;
  std::vector<float> data;
  for (const auto& [name, shape] : tensors) {
    const size_t begin = 4 * data.size();
    data.resize(data.size() + static_cast<size_t>(shape[0] * shape[1]), 1);
    header += (header.empty() ? "{\"" : ",\"") + name + R"(":{"dtype":"F32","shape":[)" + std::to_string(shape[0]) +
              "," + std::to_string(shape[1]) + R"(],"data_offsets":[)" + std::to_string(begin) + "," +
              std::to_string(4 * data.size()) + "]}";
  }
  return safetensors(header + "}", std::string(reinterpret_cast<const char*>(data.data()), 4 * data.size()));
}

TEST(Adapter, AddsItsProductToTheRowsAsked) {
  const TempFolder folder;
  const Config config = tiny_config();
  write_file(folder / "adapter_config.json", R"({"peft_type":"LORA","r":2,"lora_alpha":3})");
  write_file(folder / "adapter_model.safetensors", adapter_file(config));
  const Adapter adapter(folder.path(), config);
  EXPECT_TRUE(adapter.changes("layers.0.moe.down_proj"));
  EXPECT_FALSE(adapter.changes("layers.1.moe.down_proj"));
  const int64_t q = config.num_heads * config.head_dim;
  const auto rows = torch::zeros({4, config.hidden_size});
  adapter.merge_into(rows, "layers.0.attention.qkv_proj", q - 2);  // the last two rows of q, the first two of k
  EXPECT_TRUE(torch::equal(rows.narrow(0, 0, 2), torch::full({2, config.hidden_size}, 3.0)));  // rank 2 times 3/2
  EXPECT_TRUE(torch::equal(rows.narrow(0, 2, 2), torch::zeros({2, config.hidden_size})));
}

TEST(Adapter, GivesAnElementTheSameBitsWhateverComesWithIt) {
  const TempFolder folder;
  const Config config = mixtral_8x7b();
  const int64_t H = config.hidden_size, rank = 5;
  torch::manual_seed(3);
  const auto a = torch::randn({rank, H}), b = torch::randn({H, rank});
  const std::string name = "model.layers.0.self_attn.q_proj.lora_";
  write_file(folder / "adapter_config.json", R"({"peft_type":"LORA","r":5,"lora_alpha":3})");
  write_file(folder / "adapter_model.safetensors",
             testing::file_bytes({{name + "A.weight", a}, {name + "B.weight", b}}));
  const Adapter adapter(folder.path(), config);
  const std::string parameter = "layers.0.attention.qkv_proj";
  const auto start = torch::randn({300, 500}), all = start.clone();
  adapter.merge_into(all, parameter, 1000, 40);
  const auto expected = start + 0.6 * b.narrow(0, 1000, 300).matmul(a.narrow(1, 40, 500));
  EXPECT_TRUE(torch::allclose(all, expected, 1e-5, 1e-5));
  for (const auto& [row, rows, column, columns] : {std::tuple(0, 1, 0, 500), std::tuple(7, 33, 1, 31),
                                                   std::tuple(299, 1, 499, 1), std::tuple(100, 128, 32, 256)}) {
    const auto part = start.narrow(0, row, rows).narrow(1, column, columns).clone();
    adapter.merge_into(part, parameter, 1000 + row, 40 + column);
    EXPECT_TRUE(same_bits(part, all.narrow(0, row, rows).narrow(1, column, columns)));
  }
}

// Accepted or LoadError: any other exception fails the test, and a signal ends it.
TEST(Adapter, SurvivesEveryBitFlipOfItsFiles) {
  const TempFolder folder;
  const Config config = tiny_config();
  const auto load = [&] {
    try {
      Adapter(folder.path(), config);
    } catch (const LoadError&) {
    }
  };
  const std::string text = R"({"peft_type":"LORA","r":2,"lora_alpha":3,"rank_pattern":{".*q_proj":2},"bias":"none"})";
  const std::string weights = adapter_file(config);
  write_file(folder / "adapter_model.safetensors", weights);
  testing::for_each_bit_flip(folder / "adapter_config.json", text, 8 * text.size(), load);
  testing::for_each_bit_flip(folder / "adapter_model.safetensors", weights, 8 * (weights.find("}}") + 2), load);
}

}  // namespace
}  // namespace mixtral
