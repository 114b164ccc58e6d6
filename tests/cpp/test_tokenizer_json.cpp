// tokenizer.json and added tokens on a small hand-made vocabulary. Equality with the tokenizers library on the real
// vocabularies is tested from Python.
#include <gtest/gtest.h>

#include <algorithm>

#include "small_tokenizer_json.h"

namespace mixtral {
namespace {

constexpr int64_t kSpace = 259, kA = 260, kB = 261, kSpaceA = 263, kAb = 264, kBc = 265, kAbc = 266;
constexpr int64_t kNew = 267;  // the first free id

using Ids = std::vector<int64_t>;

TEST_F(TokenizerJsonTest, MergesByRankNotByTheLengthOrTheIdOfPieces) {
  const Tokenizer tokenizer = load(small_tokenizer());
  EXPECT_EQ(tokenizer.encode("b"), (Ids{kSpace, kB}));
  EXPECT_EQ(tokenizer.encode("ab"), (Ids{kSpaceA, kB}));  // "▁ a" goes before "a b"
  EXPECT_EQ(tokenizer.encode("bab"), (Ids{kSpace, kB, kAb}));
  EXPECT_EQ(tokenizer.encode("abc"), (Ids{kSpaceA, kBc}));  // "b c" goes first of all
  EXPECT_EQ(tokenizer.encode("babc"), (Ids{kSpace, kB, kAbc}));
  EXPECT_EQ(tokenizer.encode("b a", true, true), (Ids{1, kSpace, kB, kSpaceA, 2}));
  EXPECT_EQ(tokenizer.encode("é"), (Ids{kSpace, 3 + 0xC3, 3 + 0xA9}));
  EXPECT_EQ(tokenizer.encode(""), Ids{});
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("ab é\xFF a")), "ab é\uFFFD a");
  EXPECT_EQ(tokenizer.version(), TokenizerVersion::kV1);
  EXPECT_EQ(Tokenizer(folder_ / "tokenizer.json").encode("ab"), (Ids{kSpaceA, kB}));
}

TEST_F(TokenizerJsonTest, OfEqualPairsTheLeftmostGoesFirst) {
  json tokenizer = small_tokenizer();
  tokenizer["model"]["vocab"]["bb"] = kNew;
  tokenizer["model"]["merges"].push_back("b b");
  EXPECT_EQ(load(tokenizer).encode("bbb"), (Ids{kSpace, kNew, kB}));
}

TEST_F(TokenizerJsonTest, MergesMayBePairs) {
  json tokenizer = small_tokenizer();
  tokenizer["model"]["merges"] = json::parse(R"([["b", "c"], ["▁", "a"], ["a", "bc"], ["a", "b"]])");
  const Tokenizer pairs = load(tokenizer);
  const Tokenizer strings = load(small_tokenizer());
  for (const char* text : {"abc", "babc bab", "aabbcc"}) EXPECT_EQ(pairs.encode(text), strings.encode(text));
}

TEST_F(TokenizerJsonTest, SpacesComeFromTheNormalizerOrThePreTokenizer) {
  const json replace = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}};
  const json prepend = {{"type", "Prepend"}, {"prepend", "▁"}};
  const auto metaspace = [](const char* scheme, bool split) -> json {
    return {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", scheme}, {"split", split}};
  };
  struct Case {
    json normalizer, pre_tokenizer;
    Ids of_b, of_space_b, after_x;  // "b", " b", and "xb" where x is an added token
  };
  const Ids plain = {kB}, marked = {kSpace, kB}, twice = {kSpace, kSpace, kB};
  const std::vector<Case> cases = {
      {nullptr, metaspace("first", false), marked, marked, plain},
      {nullptr, metaspace("always", false), marked, marked, marked},
      {nullptr, metaspace("never", false), plain, marked, plain},
      {nullptr, {{"type", "Metaspace"}, {"replacement", "▁"}, {"add_prefix_space", true}}, marked, marked, marked},
      {nullptr, {{"type", "Metaspace"}, {"replacement", "▁"}, {"add_prefix_space", false}}, plain, marked, plain},
      {{{"type", "Sequence"}, {"normalizers", {prepend, replace}}}, nullptr, marked, twice, marked},
      {replace, nullptr, plain, marked, plain},
      {replace, metaspace("first", true), marked, marked, plain},
  };
  for (const Case& test : cases) {
    json tokenizer = small_tokenizer();
    tokenizer["normalizer"] = test.normalizer;
    tokenizer["pre_tokenizer"] = test.pre_tokenizer;
    tokenizer["added_tokens"].push_back(added(kNew, "x", false));
    const Tokenizer loaded = load(tokenizer);
    const std::string what = test.normalizer.dump() + test.pre_tokenizer.dump();
    EXPECT_EQ(loaded.encode("b"), test.of_b) << what;
    EXPECT_EQ(loaded.encode(" b"), test.of_space_b) << what;
    Ids after = {kNew};
    after.insert(after.end(), test.after_x.begin(), test.after_x.end());
    EXPECT_EQ(loaded.encode("xb"), after) << what;
    EXPECT_EQ(loaded.decode(loaded.encode("b")), "b") << what;
  }
}

TEST_F(TokenizerJsonTest, MetaspaceMayKeepMergesWithinWords) {
  json tokenizer = small_tokenizer();
  tokenizer["model"]["vocab"]["b▁"] = kNew;
  tokenizer["model"]["merges"].insert(tokenizer["model"]["merges"].begin(), "b ▁");
  EXPECT_EQ(load(tokenizer).encode("b b"), (Ids{kSpace, kNew, kB}));
  tokenizer["pre_tokenizer"]["split"] = true;
  EXPECT_EQ(load(tokenizer).encode("b b"), (Ids{kSpace, kB, kSpace, kB}));
}

// ---- added tokens

TEST_F(TokenizerJsonTest, SpecialTokensAreReadOnlyWhereAskedOthersAlways) {
  const Tokenizer tokenizer = load_with({added(kNew, "<b>", true), added(kNew + 1, "[b]", false)});
  EXPECT_EQ(tokenizer.encode("[b]b", false, false, false), (Ids{kNew + 1, kB}));
  EXPECT_EQ(tokenizer.encode("<b></s>", false, false, true), (Ids{kNew, 2}));
  const std::string text = "</s><b>[b]<b>";
  EXPECT_EQ(tokenizer.special_in(text), (Ids{2, kNew}));
  for (const int64_t id : tokenizer.encode(text)) EXPECT_FALSE(tokenizer.is_control(id)) << id;
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  EXPECT_EQ(tokenizer.decode({kNew, kNew + 1}), "[b]");
  EXPECT_EQ(tokenizer.piece(kNew), "<b>");
  EXPECT_EQ(tokenizer.control_id("<b>"), kNew);
  EXPECT_EQ(tokenizer.control_id("[b]"), std::nullopt);
}

// A merge that ends in a control token would let text become one.
TEST_F(TokenizerJsonTest, NoMergeMakesAControlTokenOfText) {
  json tokenizer = small_tokenizer();
  tokenizer["added_tokens"].push_back(added(kAb, "ab", true));
  const Tokenizer loaded = load(tokenizer);
  EXPECT_EQ(loaded.encode("bab"), (Ids{kSpace, kB, kA, kB}));
  EXPECT_EQ(loaded.encode("bab", false, false, true), (Ids{kSpace, kB, kAb}));
}

TEST_F(TokenizerJsonTest, TheLongestTokenIsTakenFromTheLeft) {
  const Tokenizer tokenizer =
      load_with({added(kNew, "x", false), added(kNew + 1, "xyz", false), added(kNew + 2, "yz", false)});
  EXPECT_EQ(tokenizer.encode("xyzyzx"), (Ids{kNew + 1, kNew + 2, kNew}));
  EXPECT_EQ(tokenizer.encode("xyb"), (Ids{kNew, 3 + 'y', kB}));
}

TEST_F(TokenizerJsonTest, StrippingTokensTakeTheWhiteSpaceBesideThem) {
  const Tokenizer tokenizer =
      load_with({added(kNew, "<l>", false, {{"lstrip", true}}), added(kNew + 1, "<r>", false, {{"rstrip", true}}),
                 added(kNew + 2, "<n>", false)});
  EXPECT_EQ(tokenizer.encode("b \n\u3000<l> b"), (Ids{kSpace, kB, kNew, kSpace, kB}));
  EXPECT_EQ(tokenizer.encode("b <r> \t\u2003b"), (Ids{kSpace, kB, kSpace, kNew + 1, kB}));
  EXPECT_EQ(tokenizer.encode("<r> <l>"), (Ids{kNew + 1, kNew}));  // the space is taken once
  EXPECT_EQ(tokenizer.encode("b <n> b"), (Ids{kSpace, kB, kSpace, kNew + 2, kSpace, kB}));
}

TEST_F(TokenizerJsonTest, SingleWordsStandApartFromLetters) {
  const Tokenizer tokenizer = load_with({added(kNew, "xx", false, {{"single_word", true}})});
  for (const char* text : {"xx", " xx ", "-xx!", "\u3000xx。", "👩xx"}) {
    const Ids ids = tokenizer.encode(text);
    EXPECT_EQ(std::count(ids.begin(), ids.end(), kNew), 1) << text;
  }
  for (const char* text : {"axx", "xx1", "xx_", "éxx", "xx日", "xxx"}) {
    const Ids ids = tokenizer.encode(text);
    EXPECT_EQ(std::count(ids.begin(), ids.end(), kNew), 0) << text;
  }
}

TEST_F(TokenizerJsonTest, NormalizedTokensAreFoundAsTheVocabularySpellsThem) {
  json tokenizer = small_tokenizer();
  tokenizer["added_tokens"].push_back(added(kNew, "x y", false, {{"normalized", true}}));
  tokenizer["added_tokens"].push_back(added(kNew + 1, "xz", false));
  EXPECT_EQ(load(tokenizer).encode("bx y"), (Ids{kSpace, kB, kNew}));
  tokenizer["pre_tokenizer"] = nullptr;
  tokenizer["normalizer"] = {{"type", "Sequence"},
                             {"normalizers",
                              {{{"type", "Prepend"}, {"prepend", "▁"}},
                               {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}}}}};
  const Tokenizer prepending = load(tokenizer);  // the token is looked for as "▁x▁y"
  EXPECT_EQ(prepending.encode("x y"), (Ids{kNew}));
  EXPECT_EQ(prepending.encode("bx y"), (Ids{kSpace, kB, 3 + 'x', kSpace, 3 + 'y'}));
  EXPECT_EQ(prepending.encode("xzx y"), (Ids{kNew + 1, kNew}));
}

TEST_F(TokenizerJsonTest, IdsWithoutAPieceHaveNoTextAndNoName) {
  const Tokenizer tokenizer = load_with({added(kNew + 5, "<b>", false)});
  EXPECT_EQ(tokenizer.vocab_size(), kNew + 6);
  EXPECT_EQ(tokenizer.decode({kSpaceA, kNew, kNew + 5, kNew + 6, INT64_MAX, kB}), "a<b>b");
  EXPECT_EQ(tokenizer.decode({kNew, kSpaceA}), "a");  // still the start of the text
  EXPECT_EQ(tokenizer.piece(kNew), "");
  EXPECT_EQ(tokenizer.piece(INT64_MAX), "");
  EXPECT_FALSE(tokenizer.is_control(INT64_MAX));
  EXPECT_THROW(tokenizer.decode({-1}), std::out_of_range);
}

// ---- files beside tokenizer.json

TEST_F(TokenizerJsonTest, AddedTokensComeFromThreeFiles) {
  write("tokenizer_config.json",
        json({{"added_tokens_decoder",
               {{"267", {{"content", "[b]"}, {"special", true}}}, {"268", {{"content", "[c]"}, {"special", false}}}}},
              {"eos_token", {{"content", "<e>"}}}})
            .dump());
  write("added_tokens.json", json({{"<e>", 269}, {"<f>", 270}, {"<g>", 271}}).dump());
  write("special_tokens_map.json", json({{"additional_special_tokens", {"<f>"}}}).dump());
  const Tokenizer tokenizer = load_with({added(kNew, "[b]", false, {{"rstrip", true}})});  // of two, the first counts
  EXPECT_EQ(tokenizer.encode("[b] [c]<g>"), (Ids{267, 268, 271}));
  EXPECT_EQ(tokenizer.encode("<e><f>", false, false, true), (Ids{269, 270}));
  EXPECT_TRUE(tokenizer.is_control(269) && tokenizer.is_control(270));
  EXPECT_FALSE(tokenizer.is_control(267) || tokenizer.is_control(268) || tokenizer.is_control(271));
  EXPECT_EQ(tokenizer.note(), "");
}

TEST_F(TokenizerJsonTest, TokensThatDoNotFitAreNamedAndLeftOut) {
  write("added_tokens.json", json({{"<e>", 260}, {"<f>", 267}}).dump());
  const Tokenizer tokenizer = load(small_tokenizer());
  EXPECT_EQ(tokenizer.note(), "the added token \"<e>\" (260) does not fit the vocabulary");
  EXPECT_EQ(tokenizer.piece(260), "a");
  EXPECT_EQ(tokenizer.piece(267), "<f>");
}

TEST_F(TokenizerJsonTest, AFolderMayHaveNoTokenizer) {
  EXPECT_FALSE(Tokenizer::in_folder(folder_));
  EXPECT_FALSE(Tokenizer::in_folder(folder_ / "absent"));
  EXPECT_NE(load_error().find("no tokenizer.model or tokenizer.json in this folder"), std::string::npos);
  write("tekken.json", "{}");
  EXPECT_NE(load_error().find("has a tekken tokenizer"), std::string::npos);
  write("tokenizer.json", small_tokenizer().dump());
  EXPECT_TRUE(Tokenizer::in_folder(folder_));
  EXPECT_EQ(load_error(), "loads");
}

}  // namespace
}  // namespace mixtral
