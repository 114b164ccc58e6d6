// tokenizer.json as events: its vocabulary and merges are most of the file and become no JSON values.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace mixtral {

// clang-tidy takes an assertion inside nlohmann::json for an exception.
struct TokenizerJson {  // NOLINT(bugprone-exception-escape)
  nlohmann::json rest;                                      // the keys the encoder needs, but for the two below
  std::vector<std::pair<std::string, int64_t>> vocabulary;  // model.vocab, in the file's order
  std::vector<std::pair<std::string, std::string>> merges;  // model.merges: "a b" or ["a", "b"]
};

// Throws LoadError (file `file`) for JSON that is not valid, keys that occur twice, and more than 2^20 of anything.
TokenizerJson read_tokenizer_json(const std::string& text, const std::string& file);

}  // namespace mixtral
