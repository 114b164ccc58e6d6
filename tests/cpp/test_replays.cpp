// Which sequence of a trace is forced on a request.
#include <gtest/gtest.h>

#include <stdexcept>

#include "engine/replays.h"

namespace mixtral {
namespace {

using Ids = std::vector<int64_t>;

// In two layers with one expert a token, which is its number modulo 4, then that plus 1.
Trace trace_of(const std::vector<std::vector<int32_t>>& sequences) {
  Trace trace;
  trace.model = "a";
  trace.routing.layers = 2;
  trace.routing.top_k = 1;
  trace.routing.experts = 5;
  for (const auto& tokens : sequences) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      trace.token_id.push_back(tokens[i]);
      trace.position.push_back(static_cast<int32_t>(i));
      for (const int32_t layer : {0, 1}) trace.routing.topk_ids.push_back(static_cast<uint8_t>(tokens[i] % 4 + layer));
    }
  }
  return trace;
}

Ids found(const Replays& replays, const Ids& prompt) {
  const auto sequence = replays.find(prompt);
  return sequence ? Ids(sequence->token_id.begin(), sequence->token_id.end()) : Ids();
}

TEST(Replays, ASequenceIsForThePromptsThatAgreeAsFarAsBothGo) {
  const Replays replays(trace_of({{1, 2, 3}, {1, 2}, {1, 5, 6, 7}, {9}}));
  EXPECT_EQ(found(replays, {1, 2}), (Ids{1, 2, 3}));        // the first of two that have the whole prompt
  EXPECT_EQ(found(replays, {1, 2, 3, 4}), (Ids{1, 2, 3}));  // it goes on after the trace, and further than {1, 2}
  EXPECT_EQ(found(replays, {1, 2, 4}), (Ids{1, 2}));        // {1, 2, 3} has another third token
  EXPECT_EQ(found(replays, {1, 5, 6}), (Ids{1, 5, 6, 7}));
  EXPECT_EQ(found(replays, {9, 9}), (Ids{9}));
  EXPECT_EQ(found(replays, {1, 6}), Ids());
  EXPECT_EQ(found(replays, {2}), Ids());
}

TEST(Replays, AFoundSequenceIsATraceOfItsOwn) {
  const auto sequence = Replays(trace_of({{1, 2}, {7, 6, 5}})).find({7});
  EXPECT_EQ(sequence->model, "a");
  EXPECT_EQ(sequence->position, (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(sequence->routing.topk_ids, (std::vector<uint8_t>{3, 4, 2, 3, 1, 2}));
  EXPECT_EQ(sequence->routing.tokens(), 3);
}

TEST(Replays, ARequestOfAnotherNumberOfExpertsHasNone) {
  const Replays replays(trace_of({{1, 2}}));
  EXPECT_NE(replays.find({1}, 1), nullptr);
  EXPECT_EQ(replays.find({1}, 2), nullptr);
}

TEST(Replays, PositionsCountFromZero) {
  for (const std::vector<int32_t>& positions : {std::vector<int32_t>{1, 2}, {0, 2}, {0, -1}}) {
    Trace trace = trace_of({{1, 2}});
    trace.position = positions;
    EXPECT_THROW(Replays{trace}, std::invalid_argument);
  }
}

TEST(Replays, TokensAreReplayedUntilOneDiffers) {
  const Trace trace = trace_of({{1, 2, 3}});
  EXPECT_EQ(replayed_tokens(trace, {1, 2}), 2);
  EXPECT_EQ(replayed_tokens(trace, {1, 2, 3, 4}), 3);
  EXPECT_EQ(replayed_tokens(trace, {1, 4, 3}), 1);
}

}  // namespace
}  // namespace mixtral
