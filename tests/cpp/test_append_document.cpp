// Traces of several requests become the documents of one.
#include <gtest/gtest.h>

#include <stdexcept>

#include "engine/append_document.h"

namespace mixtral {
namespace {

// Of these tokens, in one layer with one expert a token.
Trace trace_of(const std::vector<int32_t>& tokens) {
  Trace trace;
  trace.routing.layers = trace.routing.top_k = 1;
  trace.routing.experts = 4;
  for (const int32_t token : tokens) {
    trace.token_id.push_back(token);
    trace.predicted_id.push_back(token + 1);
    trace.position.push_back(trace.tokens() - 1);
    trace.routing.topk_ids.push_back(static_cast<uint8_t>(token % 4));
    trace.routing.topk_weights.push_back(static_cast<uint16_t>(token));
  }
  return trace;
}

TEST(AppendDocument, EachTraceIsOneDocumentWithPositionsOfItsOwn) {
  Trace all = trace_of({});
  for (const auto& tokens : {std::vector<int32_t>{7, 8}, {}, {9}}) append_document(all, trace_of(tokens));
  EXPECT_EQ(all.token_id, (std::vector<int32_t>{7, 8, 9}));
  EXPECT_EQ(all.predicted_id, (std::vector<int32_t>{8, 9, 10}));
  EXPECT_EQ(all.position, (std::vector<int32_t>{0, 1, 0}));
  EXPECT_EQ(all.doc, (std::vector<int32_t>{0, 0, 1}));
  EXPECT_EQ(all.domain, (std::vector<uint8_t>{0, 0, 0}));
  EXPECT_EQ(all.routing.topk_ids, (std::vector<uint8_t>{3, 0, 1}));
  EXPECT_EQ(all.routing.topk_weights, (std::vector<uint16_t>{7, 8, 9}));
}

TEST(AppendDocument, OtherSizesAreRefused) {
  Trace all = trace_of({1}), other = trace_of({2});
  other.routing.top_k = 2;
  EXPECT_THROW(append_document(all, other), std::invalid_argument);
  other.routing.top_k = 1;
  other.routing.router_logits.resize(4);
  EXPECT_THROW(append_document(all, other), std::invalid_argument);
  EXPECT_EQ(all.tokens(), 1);
}

}  // namespace
}  // namespace mixtral
