// What tokenizers take: to load a file, 64 MiB and its size; to encode a text, 64 times its size.
#include "checkpoint_files.h"
#include "small_tokenizer_json.h"

namespace mixtral {
namespace {

using testing::peak_memory;
using testing::peak_memory_from_now;

constexpr size_t kMiB = size_t{1} << 20;

std::string repeated(const std::string& text, size_t times) {
  std::string out;
  for (size_t i = 0; i < times; ++i) out += text;
  return out;
}

// All words of the letters a to z with this many letters, in order.
std::vector<std::string> words(size_t letters) {
  if (letters == 0) return {""};
  std::vector<std::string> out;
  for (const std::string& word : words(letters - 1)) {
    for (char c = 'a'; c <= 'z'; ++c) out.push_back(word + c);
  }
  return out;
}

// As many pieces and merges as may be: all words of up to three letters, words of four, and every way to make them.
json largest_tokenizer() {
  json tokenizer = small_tokenizer();
  std::vector<std::string> pieces;
  for (const size_t letters : {1, 2, 3, 4}) {
    for (std::string& word : words(letters)) pieces.push_back(std::move(word));
  }
  pieces.resize((1 << 18) - 300);
  json vocabulary = json::object(), merges = json::array();
  for (const auto& [piece, id] : tokenizer["model"]["vocab"].items()) {
    if (id < 260) vocabulary[piece] = id;
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    vocabulary[pieces[i]] = 260 + i;
    for (size_t cut = 1; cut < pieces[i].size() && merges.size() < 1 << 19; ++cut)
      merges.push_back(pieces[i].substr(0, cut) + " " + pieces[i].substr(cut));
  }
  tokenizer["model"]["vocab"] = std::move(vocabulary);
  tokenizer["model"]["merges"] = std::move(merges);
  return tokenizer;
}

class TokenizerMemoryTest : public TokenizerJsonTest {
 protected:
  void expect_little_memory(const std::string& name, const std::string& text, const std::string& outcome) {
    write(name, text);
    const int64_t before = peak_memory_from_now();
    const std::string error = load_error();
    EXPECT_NE(error.find(outcome), std::string::npos) << error;
    EXPECT_LT(peak_memory() - before, static_cast<int64_t>(text.size() + 64 * kMiB)) << outcome;
  }
};

TEST_F(TokenizerMemoryTest, LoadingTakes64MiBAndTheFile) {
  expect_little_memory("tokenizer.json", largest_tokenizer().dump(), "loads");
  json tokenizer = small_tokenizer();
  for (int i = 0; i < 16000; ++i) tokenizer["added_tokens"].push_back(added(300 + i, "<" + std::to_string(i), i % 2));
  expect_little_memory("tokenizer.json", tokenizer.dump(), "loads");
  tokenizer["added_tokens"] = json::array();
  for (int i = 0; i < 1 << 17; ++i) tokenizer["added_tokens"].push_back(json::object());
  expect_little_memory("tokenizer.json", tokenizer.dump(), "2^17 values");
  tokenizer = small_tokenizer();
  for (int i = 0; i < 30'000; ++i) tokenizer["model"]["vocab"][std::to_string(i) + std::string(1000, 'x')] = 300 + i;
  expect_little_memory("tokenizer.json", tokenizer.dump(), "loads");
  expect_little_memory("tokenizer.json", "{\"model\":{\"vocab\":{\"" + std::string(31 * kMiB, 'x'), "1 MiB without");
  expect_little_memory("tokenizer.json", "{\"model\":" + std::string(31 * kMiB, '\n'), "1 MiB without");
}

TEST_F(TokenizerMemoryTest, TheFilesBesideTake64MiBAndTheirSize) {
  write("tokenizer.json", small_tokenizer().dump());
  for (const std::string file : {"tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"}) {
    expect_little_memory(file, "{\"a\":[" + repeated("{},", kMiB / 4) + "{}]}", "131072 values");
    expect_little_memory(file, "{\"a\":\"" + std::string(7 * kMiB, 'x') + "\"}", "1 MiB without");
    write(file, "{}");
  }
  std::string tokens;
  for (int i = 0; i < 43'000; ++i) {
    tokens += (i ? ",\"" : "\"") + std::to_string(300 + i) + "\":{\"content\":\"<" + std::string(100, 'x') +
              std::to_string(i) + "\",\"special\":true}";
  }
  expect_little_memory("tokenizer_config.json", "{\"added_tokens_decoder\":{" + tokens + "}}", "loads");
}

TEST_F(TokenizerMemoryTest, EncodingTakes64BytesForEachOfTheText) {
  json tokenizer = small_tokenizer();
  tokenizer["added_tokens"].push_back(added(300, "aaa", false, {{"rstrip", true}, {"lstrip", true}}));
  tokenizer["added_tokens"].push_back(added(301, "  ", false, {{"rstrip", true}, {"lstrip", true}}));
  for (const json& file : {small_tokenizer(), tokenizer}) {
    const Tokenizer loaded = load(file);
    for (const std::string part : {"a", " ", "\xFF", "é", "ab c "}) {
      const std::string text = repeated(part, kMiB / part.size());
      const int64_t before = peak_memory_from_now();
      loaded.encode(text);
      EXPECT_LT(peak_memory() - before, static_cast<int64_t>(64 * kMiB)) << part;
    }
  }
}

}  // namespace
}  // namespace mixtral
