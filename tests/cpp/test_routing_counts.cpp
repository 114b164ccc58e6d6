// The counts of all requests are those of their traces.
#include "engine/routing_counts.h"
#include "generations.h"

namespace mixtral {
namespace {

// Adds the rows of a trace to [L,E] counts.
void add_trace(const Trace& trace, std::vector<int64_t>& first, std::vector<int64_t>& chosen) {
  const Routing& routing = trace.routing;
  for (int64_t token = 0; token < trace.tokens(); ++token) {
    const uint8_t* ids = routing.experts_of(token);
    for (int64_t i = 0; i < routing.layers * routing.top_k; ++i) {
      const int64_t place = i / routing.top_k * routing.experts + ids[i];
      ++chosen[static_cast<size_t>(place)];
      if (i % routing.top_k == 0) ++first[static_cast<size_t>(place)];
    }
  }
}

TEST(RoutingCounts, AreThoseOfTheTracesOfAllRequests) {
  Engine engine(tiny_model(tiny_config()), std::nullopt, {});
  std::vector<Request> requests;
  for (const int64_t k : {0, 1, 3}) {
    for (const auto& prompt : some_prompts()) {
      Request request;
      request.prompt_token_ids = prompt;
      request.params = params(9);
      request.experts_per_token = k;
      request.trace = true;
      requests.push_back(request);
    }
  }
  std::vector<int64_t> first(2 * 4), chosen(2 * 4);
  int64_t tokens = 0;
  for (const Generation& generation : engine.generate(requests)) {
    add_trace(*generation.trace, first, chosen);
    tokens += generation.trace->tokens();
  }
  const auto counts = engine.routing_counts();
  ASSERT_TRUE(counts);
  EXPECT_EQ(counts->tokens, tokens);
  EXPECT_EQ(counts->first, first);
  EXPECT_EQ(counts->chosen, chosen);
}

TEST(RoutingCounts, RequestsThatAreNotTracedCountToo) {
  const auto model = tiny_model(tiny_config());
  Engine traced(model, std::nullopt, {}), plain(model, std::nullopt, {});
  Request request;
  request.prompt_token_ids = some_prompts()[0];
  request.params = params(9);
  plain.generate({request});
  request.trace = true;
  traced.generate({request});
  EXPECT_EQ(plain.routing_counts()->tokens, 13 + 9 - 1);
  EXPECT_EQ(plain.routing_counts()->chosen, traced.routing_counts()->chosen);
}

TEST(RoutingCounts, NothingIsCountedWithoutExperts) {
  EXPECT_FALSE(Engine(tiny_model(tiny_config(0)), std::nullopt, {}).routing_counts());
}

TEST(RoutingCounts, AnIdBelowZeroIsNone) {
  RoutingCounts counts(1, 3);
  const std::vector<int32_t> ids = {2, 0, 1, -1};
  counts.add({ids.data()}, 2, 2);
  EXPECT_EQ(counts.totals().tokens, 2);
  EXPECT_EQ(counts.totals().first, (std::vector<int64_t>{0, 1, 1}));
  EXPECT_EQ(counts.totals().chosen, (std::vector<int64_t>{1, 1, 1}));
}

}  // namespace
}  // namespace mixtral
