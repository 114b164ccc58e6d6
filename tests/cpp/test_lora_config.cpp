#include <cmath>

#include "checkpoint/lora_config.h"
#include "checkpoint_files.h"
#include "io/nearest.h"

namespace mixtral {
namespace {

using testing::expect_load_error;
using testing::TempFolder;
using testing::write_file;

const std::string kModule = "model.layers.12.self_attn.q_proj";

TEST(LoraPattern, FitsFromTheBeginningOrFromADot) {
  for (const char* pattern :
       {"q_proj", "self_attn.q_proj", "model.layers.12.self_attn.q_proj", ".*.q_proj", R"(.*\.q_proj)",
        "^model.*q_proj", "q_proj$", R"(layers\.12\..*)", ".*", "model.layers.1..self_attn.q_proj"})
    EXPECT_TRUE(fits_pattern(pattern, kModule)) << pattern;
  for (const char* pattern :
       {"proj", "q_pro", "k_proj", "^q_proj", "^self_attn.q_proj", "layers.1", "", "^", R"(q\.proj)"})
    EXPECT_FALSE(fits_pattern(pattern, kModule)) << pattern;
}

TEST(LoraPattern, RefusesOtherExpressions) {
  for (const char* pattern : {"(q|k)_proj", "[qk]_proj", "q+", "q?", R"(\d)", "a|b", "x{2}", "q*", "a^", "a$b"})
    EXPECT_THROW(fits_pattern(pattern, kModule), std::invalid_argument) << pattern;
}

// A regular expression could take for ever here.
TEST(LoraPattern, TakesLinearTime) {
  std::string pattern;
  for (int i = 0; i < 2000; ++i) pattern += ".*a";
  EXPECT_FALSE(fits_pattern(pattern + "b", std::string(2000, 'a')));
}

LoraConfig read(const std::string& config) {
  const TempFolder folder;
  write_file(folder / "adapter_config.json", config);
  write_file(folder / "adapter_model.safetensors", "");
  return read_lora_config(folder.path());
}

TEST(LoraConfig, ScalesAsPeft) {
  const LoraConfig plain = read(R"({"peft_type":"LORA","r":8,"lora_alpha":12})");
  EXPECT_DOUBLE_EQ(plain.scale(kModule, 8), 1.5);
  expect_load_error([&] { plain.scale(kModule, 4); }, "rank must be 8 as in adapter_config.json, got 4");
  const LoraConfig stabilised = read(R"({"peft_type":"LORA","r":8,"lora_alpha":12,"use_rslora":true})");
  EXPECT_DOUBLE_EQ(stabilised.scale(kModule, 8), 12 / std::sqrt(8.0));
  const LoraConfig patterns = read(
      R"({"peft_type":"LORA","r":8,"lora_alpha":12,"rank_pattern":{"q_proj":4},"alpha_pattern":{".*\\.12\\..*":2}})");
  EXPECT_DOUBLE_EQ(patterns.scale(kModule, 4), 0.5);
  EXPECT_DOUBLE_EQ(patterns.scale("model.layers.1.self_attn.k_proj", 8), 1.5);
}

TEST(LoraConfig, KnowsTheLayoutOfItsVersion) {
  const auto swapped = [](const std::string& version) {
    return read(R"({"peft_type":"LORA","r":8,"lora_alpha":8)" + version + "}").swapped_experts;
  };
  EXPECT_TRUE(swapped(""));
  EXPECT_TRUE(swapped(R"(,"peft_version":"0.18.1")"));
  EXPECT_TRUE(swapped(R"(,"peft_version":"0.19.0")"));
  EXPECT_FALSE(swapped(R"(,"peft_version":"0.19.1")"));
  EXPECT_FALSE(swapped(R"(,"peft_version":"0.20.0.dev0")"));
  EXPECT_FALSE(swapped(R"(,"peft_version":"1.0.0.dev0")"));
}

TEST(LoraConfig, TakesTheScalingOfMistralFinetune) {
  const TempFolder folder;
  expect_load_error([&] { read_lora_config(folder.path()); }, "is no adapter");
  write_file(folder / "lora.safetensors", "");
  EXPECT_DOUBLE_EQ(read_lora_config(folder.path()).scale("layers.0.attention.wq", 64), 2);
  write_file(folder / "params.json", R"({"dim":64,"lora":{"enable":true,"rank":64,"scaling":0.5}})");
  for (const auto& path : {folder.path(), folder / "lora.safetensors"})
    EXPECT_DOUBLE_EQ(read_lora_config(path).scale("layers.0.attention.wq", 64), 0.5);
}

TEST(Nearest, IsTheNameWithTheFewestChanges) {
  EXPECT_EQ(nearest("--temp", {"--top-p", "--temperature", "--tmp"}), "--tmp");
  EXPECT_EQ(nearest("generate", {"quantize", "bench"}), "");
  EXPECT_EQ(nearest("a", {std::string(1 << 20, 'a')}), "");
}

}  // namespace
}  // namespace mixtral
