// tokenizer.json as events: its vocabulary and merges are most of the file and become no JSON values.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mixtral {

// clang-tidy takes an assertion inside nlohmann::json for an exception.
struct TokenizerJson {                                      // NOLINT(bugprone-exception-escape)
  nlohmann::json rest;                                      // the keys the encoder needs, but for the two below
  std::vector<std::pair<std::string, int64_t>> vocabulary;  // model.vocab, in the file's order
  std::string merge_text;                                   // model.merges, "a b" or ["a", "b"]: their texts in a row
  std::vector<uint32_t> merge_ends;                         // of each of the two texts of each merge in `merge_text`

  size_t merge_count() const { return merge_ends.size() / 2; }
  std::string_view merge_half(size_t index) const {  // 2 i and 2 i + 1 are the halves of merge i
    const size_t begin = index == 0 ? 0 : merge_ends[index - 1];
    return std::string_view(merge_text).substr(begin, merge_ends[index] - begin);
  }
};

// Throws LoadError (file `file`) for JSON that is not valid, keys that occur twice, and more than 2^18 pieces, 2^19
// merges or 2^17 other values.
TokenizerJson read_tokenizer_json(const std::string& text, const std::string& file);

}  // namespace mixtral
