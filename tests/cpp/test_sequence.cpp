// How a generation ends, token by token, without a model.
#include <gtest/gtest.h>

#include <filesystem>

#include "engine/sequence.h"

namespace mixtral {
namespace {

constexpr int64_t kEos = 2;

class SequenceText : public ::testing::Test {
 protected:
  // The id of a token that is one byte.
  int64_t byte(const std::string& piece) const {
    for (int64_t id = 0; id < tokenizer.vocab_size(); ++id)
      if (tokenizer.is_byte(id) && tokenizer.piece(id) == piece) return id;
    throw std::runtime_error(piece);
  }
  int64_t letter_a() const { return tokenizer.encode("a").back(); }

  // Appends tokens until the sequence ends. `shown`: what a callback would get.
  Generation run(const std::vector<int64_t>& ids, SamplingParams params, std::string* shown = nullptr) {
    Sequence sequence(0, {{1, 5}, params, ""}, {}, tokenizer);
    std::string text;
    for (const int64_t id : ids) {
      EXPECT_FALSE(sequence.finished());
      text += sequence.append({id, std::nullopt, ""}, {kEos}).value_or("");
    }
    if (shown) *shown = text;
    EXPECT_EQ(text, sequence.generation.text);
    return sequence.generation;
  }
  static SamplingParams params(int64_t max_tokens, std::vector<std::string> stop = {}) {
    SamplingParams out;
    out.max_tokens = max_tokens;
    out.stop = std::move(stop);
    return out;
  }

  Tokenizer tokenizer{std::filesystem::path(MIXTRAL_SOURCE_DIR) / "models/demo"};
};

// U+65E5 is e6 97 a5.
TEST_F(SequenceText, BytesOfACutCodePointAreShownAtEveryEnd) {
  const std::vector<int64_t> cut = {letter_a(), byte("<0xE6>"), byte("<0x97>")};
  const auto whole = run({letter_a(), byte("<0xE6>"), byte("<0x97>"), byte("<0xA5>")}, params(4));
  EXPECT_EQ(whole.text.substr(whole.text.size() - 3), "日");
  const std::string before = whole.text.substr(0, whole.text.size() - 3);

  const auto by_length = run(cut, params(3));
  EXPECT_EQ(by_length.text, before + "\uFFFD\uFFFD");
  EXPECT_EQ(by_length.finish_reason, "length");

  auto ids = cut;
  ids.push_back(kEos);
  const auto by_eos = run(ids, params(9));
  EXPECT_EQ(by_eos.text, before + "\uFFFD\uFFFD");
  EXPECT_EQ(by_eos.finish_reason, "stop");
  EXPECT_EQ(by_eos.token_ids, cut);
}

TEST_F(SequenceText, AStopStringThatOnlyTheEndCompletesIsAStop) {
  const std::vector<int64_t> cut = {letter_a(), byte("<0xE6>")};
  const auto by_length = run(cut, params(2, {"a\uFFFD"}));
  EXPECT_EQ(by_length.finish_reason, "stop");
  EXPECT_EQ(by_length.text.find("a"), std::string::npos);
  EXPECT_EQ(by_length.token_ids, cut);
}

TEST_F(SequenceText, AStopStringMayNameAControlToken) {
  SamplingParams stop = params(9, {"</s>"});
  stop.ignore_eos = true;
  const auto stopped = run({letter_a(), kEos}, stop);
  EXPECT_EQ(stopped.finish_reason, "stop");
  EXPECT_EQ(stopped.token_ids, std::vector<int64_t>{letter_a()});
  stop.stop = {"<s>"};
  EXPECT_EQ(run(std::vector<int64_t>(9, kEos), stop).finish_reason, "length");
}

TEST_F(SequenceText, IdsWithoutAPieceHaveNoText) {
  const auto plain = run({letter_a(), letter_a()}, params(2));
  EXPECT_EQ(run({letter_a(), tokenizer.vocab_size() + 7, letter_a()}, params(3)).text, plain.text);
}

TEST_F(SequenceText, TextHeldBackForAStopStringIsShownAtTheEnd) {
  std::string shown;
  const auto plain = run({letter_a(), letter_a()}, params(2));
  const auto held = run({letter_a(), letter_a()}, params(2, {plain.text + "!"}), &shown);
  EXPECT_EQ(held.finish_reason, "length");
  EXPECT_EQ(held.text, plain.text);
  EXPECT_EQ(shown, plain.text);
}

TEST_F(SequenceText, AStopStringInTheLastTokenIsAStopAndNotALength) {
  const auto plain = run({letter_a(), letter_a()}, params(2));
  EXPECT_EQ(plain.finish_reason, "length");
  EXPECT_EQ(run({letter_a(), letter_a()}, params(2, {plain.text})).finish_reason, "stop");
}

TEST_F(SequenceText, AnErrorKeepsTheTextUntilThen) {
  Sequence sequence(0, {{1}, params(5), ""}, {}, tokenizer);
  sequence.append({letter_a(), std::nullopt, ""}, {kEos});
  EXPECT_EQ(sequence.append({-1, std::nullopt, "nan"}, {kEos}), std::nullopt);
  EXPECT_EQ(sequence.generation.finish_reason, "error");
  EXPECT_EQ(sequence.generation.error, "nan");
  EXPECT_EQ(sequence.generation.token_ids.size(), 1u);
}

TEST(Sequence, EndOfSequenceIsATokenLikeOthersWhenIgnored) {
  SamplingParams params;
  params.max_tokens = 2;
  params.ignore_eos = true;
  Sequence sequence(0, {{1}, params, ""}, {}, std::nullopt);
  EXPECT_EQ(sequence.append({kEos, std::nullopt, ""}, {kEos}), "");
  EXPECT_FALSE(sequence.finished());
  sequence.append({kEos, std::nullopt, ""}, {kEos});
  EXPECT_EQ(sequence.generation.finish_reason, "length");
}

}  // namespace
}  // namespace mixtral
