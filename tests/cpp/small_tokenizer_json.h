// A small hand-made tokenizer.json, and a folder to load it from.
#pragma once

#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "io/load_error.h"
#include "text/tokenizer.h"

namespace mixtral {

using nlohmann::json;

inline json added(int64_t id, const std::string& text, bool special, json more = json::object()) {
  json token = {{"id", id},        {"content", text},     {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", special}};
  token.update(more);
  return token;
}

// Ids: 0 <unk>, 1 <s>, 2 </s>, the 256 bytes, then text from 259 on: ▁ a b c ▁a ab bc abc.
inline json small_tokenizer() {
  json vocabulary = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}};
  for (int i = 0; i < 256; ++i) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", i);
    vocabulary[text] = 3 + i;
  }
  int id = 259;
  for (const char* text : {"▁", "a", "b", "c", "▁a", "ab", "bc", "abc"}) vocabulary[text] = id++;
  const json model = {{"type", "BPE"},
                      {"dropout", nullptr},
                      {"unk_token", "<unk>"},
                      {"continuing_subword_prefix", nullptr},
                      {"end_of_word_suffix", nullptr},
                      {"fuse_unk", true},
                      {"byte_fallback", true},
                      {"ignore_merges", false},
                      {"vocab", vocabulary},
                      {"merges", {"b c", "▁ a", "a bc", "a b"}}};
  return {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"added_tokens", {added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)}},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", "first"}, {"split", false}}},
      {"post_processor", {{"type", "TemplateProcessing"}, {"single", json::array({1, 2})}}},
      {"decoder", nullptr},
      {"model", model}};
}

class TokenizerJsonTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / ("mixtral_json_" + std::to_string(std::random_device{}()));
    std::filesystem::create_directory(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }
  Tokenizer load(const json& tokenizer) {
    write("tokenizer.json", tokenizer.dump());
    return Tokenizer(folder_);
  }
  Tokenizer load_with(std::vector<json> tokens) {
    json tokenizer = small_tokenizer();
    for (json& token : tokens) tokenizer["added_tokens"].push_back(std::move(token));
    return load(tokenizer);
  }
  std::string load_error() {
    try {
      Tokenizer tokenizer(folder_);
    } catch (const LoadError& error) {
      return error.what();
    }
    return "loads";
  }

  std::filesystem::path folder_;
};

}  // namespace mixtral
