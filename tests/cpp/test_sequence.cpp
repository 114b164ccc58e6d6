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
    Sequence sequence(0, {{1, 5}, params}, {}, tokenizer, {kEos});
    std::string text;
    for (const int64_t id : ids) {
      EXPECT_FALSE(sequence.finished());
      text += sequence.append({id, std::nullopt, ""}).value_or("");
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

TEST_F(SequenceText, NoStopStringEndsItBeforeMinTokens) {
  const auto plain = run({letter_a(), letter_a(), letter_a()}, params(3));
  const std::string first = run({letter_a()}, params(1)).text;
  SamplingParams stop = params(3, {first});
  EXPECT_EQ(run({letter_a()}, stop).text, "");
  stop.min_tokens = 2;
  const auto later = run({letter_a(), letter_a()}, stop);
  EXPECT_EQ(later.finish_reason, "stop");
  EXPECT_EQ(later.text, first);
  stop.min_tokens = 3;
  EXPECT_EQ(run({letter_a(), letter_a(), letter_a()}, stop).finish_reason, "stop");
  stop.min_tokens = 4;
  const auto never = run({letter_a(), letter_a(), letter_a()}, stop);
  EXPECT_EQ(never.finish_reason, "length");
  EXPECT_EQ(never.text, plain.text);
}

TEST_F(SequenceText, AnErrorKeepsTheTextUntilThen) {
  Sequence sequence(0, {{1}, params(5)}, {}, tokenizer, {kEos});
  sequence.append({letter_a(), std::nullopt, ""});
  EXPECT_EQ(sequence.append({-1, std::nullopt, "nan"}), std::nullopt);
  EXPECT_EQ(sequence.generation.finish_reason, "error");
  EXPECT_EQ(sequence.generation.error, "nan");
  EXPECT_EQ(sequence.generation.token_ids.size(), 1u);
}

TEST(Sequence, EndOfSequenceIsATokenLikeOthersWhenIgnored) {
  SamplingParams params;
  params.max_tokens = 2;
  params.ignore_eos = true;
  Sequence sequence(0, {{1}, params}, {}, std::nullopt, {kEos});
  EXPECT_EQ(sequence.append({kEos, std::nullopt, ""}), "");
  EXPECT_FALSE(sequence.finished());
  sequence.append({kEos, std::nullopt, ""});
  EXPECT_EQ(sequence.generation.finish_reason, "length");
}

TEST(Sequence, AStopTokenEndsItWithoutBeingPartOfIt) {
  SamplingParams params;
  params.ignore_eos = true;  // is about the model's own ends alone
  params.stop_token_ids = {7, 9};
  Sequence sequence(0, {{9}, params}, {}, std::nullopt, {kEos});
  sequence.append({kEos, std::nullopt, ""});
  EXPECT_FALSE(sequence.finished());
  EXPECT_EQ(sequence.append({9, std::nullopt, ""}), std::nullopt);
  EXPECT_EQ(sequence.generation.finish_reason, "stop");
  EXPECT_EQ(sequence.generation.token_ids, (std::vector<int64_t>{kEos}));
}

TEST(Sequence, NoTokenThatEndsItComesBeforeMinTokens) {
  SamplingParams params;
  params.min_tokens = 2;
  params.stop_token_ids = {1};
  Sequence sequence(0, {{5}, params}, {}, std::nullopt, {kEos});
  const std::vector<float> logits = {0, 3, 2, 1};  // the stop token, then the end of sequence, are the likeliest
  const auto step = [&] { sequence.append({sequence.sampler.next(logits.data(), 4), std::nullopt, ""}); };
  step();
  step();
  EXPECT_FALSE(sequence.finished());
  step();
  EXPECT_EQ(sequence.generation.finish_reason, "stop");
  EXPECT_EQ(sequence.generation.token_ids, (std::vector<int64_t>{3, 3}));
}

}  // namespace
}  // namespace mixtral
