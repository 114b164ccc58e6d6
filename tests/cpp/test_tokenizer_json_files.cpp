// Files that are no tokenizer.json of the SentencePiece kind, or no sound one: each is a LoadError of one line.
#include <gtest/gtest.h>

#include <functional>

#include "small_tokenizer_json.h"
#include "text/tokenizer_json.h"

namespace mixtral {
namespace {

TEST_F(TokenizerJsonTest, OtherKindsAreRefusedByNameAndFaultsWithTheirPlace) {
  struct Case {
    std::string reason;  // part of the message
    std::function<void(json&)> change;
  };
  const auto model = [](const char* key, json value) { return [=](json& t) { t["model"][key] = value; }; };
  const auto token = [](json value) { return [=](json& t) { t["added_tokens"].push_back(value); }; };
  const std::vector<Case> cases = {
      {"loads", [](json&) {}},
      {"is a Unigram tokenizer, which is not supported", model("type", "Unigram")},
      {"is a WordPiece tokenizer", model("type", "WordPiece")},
      {"is a 7 tokenizer", model("type", 7)},
      {"is a byte-level BPE tokenizer",
       [](json& t) {
         t["pre_tokenizer"] = {{"type", "ByteLevel"}};
       }},
      {"is a byte-level BPE tokenizer",
       [](json& t) {
         t["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {{{"type", "Split"}}, {{"type", "ByteLevel"}}}}};
       }},
      {"is a BPE tokenizer without byte fallback", model("byte_fallback", false)},
      {"is a tokenizer without a \"model\"", [](json& t) { t.erase("model"); }},
      {"(tekken, perhaps)",
       [](json& t) {
         t = {{"config", 1}, {"vocab", {1, 2}}};
       }},
      {"model: must be an object",
       [](json& t) {
         t["model"] = {1, {2}};
       }},
      {"vocab: is missing", [](json& t) { t["model"].erase("vocab"); }},
      {"merges: is missing", [](json& t) { t["model"].erase("merges"); }},
      {"vocab: must be an object", model("vocab", json::array({1}))},
      {"merges: must be a list", model("merges", "a b")},
      {"vocab: must not be empty", model("vocab", json::object())},
      {"256 byte pieces, got 255", [](json& t) { t["model"]["vocab"].erase("<0x41>"); }},
      {"vocab: x: the id must be a whole number", [](json& t) { t["model"]["vocab"]["x"] = "267"; }},
      {"vocab: x: the id must be a whole number", [](json& t) { t["model"]["vocab"]["x"] = {1}; }},
      {"vocab: x: the id must be a whole number", [](json& t) { t["model"]["vocab"]["x"] = 1.5; }},
      {"vocab: x: the id must be a whole number", [](json& t) { t["model"]["vocab"]["x"] = UINT64_MAX; }},
      {"vocab: x: id must be in [0, 2^18), got -1", [](json& t) { t["model"]["vocab"]["x"] = -1; }},
      {"vocab: x: id must be in [0, 2^18), got 262144", [](json& t) { t["model"]["vocab"]["x"] = 262144; }},
      {"vocab: x: has the id 260 of another piece", [](json& t) { t["model"]["vocab"]["x"] = 260; }},
      {"text must not be empty", [](json& t) { t["model"]["vocab"][""] = 267; }},
      {"at most 1024 bytes", [](json& t) { t["model"]["vocab"][std::string(1025, 'x')] = 267; }},
      {"merge 4 (a x): not in vocab", [](json& t) { t["model"]["merges"].push_back("a x"); }},
      {"merge 4 (b a): not in vocab", [](json& t) { t["model"]["merges"].push_back("b a"); }},
      {"merge 4: must be two pieces", [](json& t) { t["model"]["merges"].push_back("ab"); }},
      {"merge 4: must be two pieces", [](json& t) { t["model"]["merges"].push_back("a b c"); }},
      {"merge 4: must be two pieces", [](json& t) { t["model"]["merges"].push_back(" b"); }},
      {"merge 4: must be two pieces", [](json& t) { t["model"]["merges"].push_back(json::array({"a"})); }},
      {"merge 4: must be two pieces",
       [](json& t) {
         t["model"]["merges"].push_back({"a", "b", "c"});
       }},
      {"merge 4: must be two pieces",
       [](json& t) {
         t["model"]["merges"].push_back({"a", 1});
       }},
      {"merge 4: must be two pieces", [](json& t) { t["model"]["merges"].push_back(1); }},
      {"merge 4: must be two pieces",
       [](json& t) {
         t["model"]["merges"].push_back({{"a", "b"}});
       }},
      {"dropout: must be null or 0.0, got 0.5", model("dropout", 0.5)},
      {"continuing_subword_prefix: must be null", model("continuing_subword_prefix", "##")},
      {"end_of_word_suffix: must be null", model("end_of_word_suffix", "</w>")},
      {"ignore_merges: must be null or false", model("ignore_merges", true)},
      {"normalizer: must prepend U+2581 or replace spaces by it, got NFKC",
       [](json& t) {
         t["normalizer"] = {{"type", "NFKC"}};
       }},
      {"got Replace",
       [](json& t) {
         t["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", " "}}}, {"content", "▁"}};
       }},
      {"got Prepend",
       [](json& t) {
         t["normalizer"] = {{"type", "Prepend"}, {"prepend", "_"}};
       }},
      {"normalizers: must be a list",
       [](json& t) {
         t["normalizer"] = {{"type", "Sequence"}};
       }},
      {"must replace spaces", [](json& t) { t["pre_tokenizer"] = nullptr; }},
      {"pre_tokenizer: must be null or Metaspace, got Whitespace",
       [](json& t) {
         t["pre_tokenizer"] = {{"type", "Whitespace"}};
       }},
      {"Metaspace must replace by U+2581", [](json& t) { t["pre_tokenizer"]["replacement"] = "_"; }},
      {"prepend_scheme: must be always, first or never, got \"last\"",
       [](json& t) { t["pre_tokenizer"]["prepend_scheme"] = "last"; }},
      {"must not both prepend",
       [](json& t) {
         t["normalizer"] = {{"type", "Prepend"}, {"prepend", "▁"}};
       }},
      {"added_tokens: must be a list", [](json& t) { t["added_tokens"] = 3; }},
      {"id must be a whole number, got null", token("x")},
      {"id must be in [0, 2^18)", token(added(1 << 18, "x", false))},
      {"id must be in [0, 2^18)", token(added(-1, "x", false))},
      {"content must be a text, got 3", token({{"id", 300}, {"content", 3}})},
      {"content must not be empty", token(added(300, "", false))},
      {"content must have at most 1024 bytes", token(added(300, std::string(1025, 'x'), false))},
      {"lstrip must be true or false, got \"no\"", token(added(300, "x", false, {{"lstrip", "no"}}))},
      {"added_tokens: ab: has the id 264 in vocab, 300 here", token(added(300, "ab", false))},
      {"<s>: control token is missing", [](json& t) { t["added_tokens"] = json::array(); }},
  };
  for (const Case& test : cases) {
    json tokenizer = small_tokenizer();
    test.change(tokenizer);
    write("tokenizer.json", tokenizer.dump());
    const std::string error = load_error();
    EXPECT_NE(error.find(test.reason), std::string::npos) << error << "\nexpected: " << test.reason;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  }
}

TEST_F(TokenizerJsonTest, TextThatIsNoJsonIsRefused) {
  const std::string valid = small_tokenizer().dump();
  std::string twice = valid;
  twice.insert(twice.find("\"abc\":"), "\"ab\":400,");
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"is empty", ""},
      {"is not a JSON object", "[]"},
      {"is not a JSON object", "\xEF\xBB\xBF" + valid},
      {"is not valid JSON", valid.substr(0, valid.size() - 1)},
      {"is not valid JSON", valid + "x"},
      {"is not valid JSON", "{\"model\": {\"vocab\": {\"\xFF\": 1}}}"},
      {"key occurs twice", "{\"model\": {}, \"model\": {}}"},
      {"key occurs twice", "{\"model\": {\"vocab\": {}, \"vocab\": {}}}"},
      {"vocab: ab: occurs twice", twice},
      {"nested deeper than 64 levels", "{\"x\": " + std::string(100, '[') + std::string(100, ']') + "}"},
  };
  for (const auto& [reason, text] : cases) {
    write("tokenizer.json", text);
    EXPECT_NE(load_error().find(reason), std::string::npos) << load_error() << "\nexpected: " << reason;
  }
  for (const char* file : {"added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"}) {
    write("tokenizer.json", valid);
    write(file, "{");
    EXPECT_NE(load_error().find(std::string(file) + ": is not valid JSON"), std::string::npos) << load_error();
    write(file, "{}");
  }
  write("added_tokens.json", "{\"x\": \"1\"}");
  EXPECT_NE(load_error().find("added_tokens.json: x: id must be a whole number"), std::string::npos);
  write("added_tokens.json", "{\"x\": 99999999999}");
  EXPECT_NE(load_error().find("id must be in [0, 2^18)"), std::string::npos);
  write("added_tokens.json", "{}");
  write("tokenizer_config.json", "{\"added_tokens_decoder\": {\"x\": {}}}");
  EXPECT_NE(load_error().find("an id must be a whole number, got x"), std::string::npos);
}

TEST_F(TokenizerJsonTest, EveryCutAndEveryFlippedBitParsesOrIsALoadError) {
  const std::string valid = small_tokenizer().dump();
  const auto parses = [](const std::string& text) {
    try {
      return !parse_tokenizer_json(text, "file").pieces.empty();
    } catch (const LoadError&) {
      return false;
    }
  };
  ASSERT_TRUE(parses(valid));
  for (size_t size = 0; size < valid.size(); ++size) EXPECT_FALSE(parses(valid.substr(0, size))) << size;
  int accepted = 0;
  for (size_t byte = 0; byte < valid.size(); ++byte) {
    if (byte == valid.find("<0x10>")) byte = valid.find("<0xF0>");  // most of the file: one like the other
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = valid;
      flipped[byte] = static_cast<char>(flipped[byte] ^ (1 << bit));
      accepted += parses(flipped);
    }
  }
  EXPECT_GT(accepted, 300);  // names of keys that are not needed
}

}  // namespace
}  // namespace mixtral
