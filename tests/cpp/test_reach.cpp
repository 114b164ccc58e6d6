#include <nlohmann/json.hpp>
#include <stdexcept>

#include "engine/context_score.h"
#include "engine/reach.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

// The last output of a text in each of the ways to run it.
std::vector<torch::Tensor> last_logits(Mixtral& model, const std::vector<int64_t>& ids) {
  const auto last = [&](const torch::Tensor& hidden) { return model->logits(hidden.narrow(0, hidden.size(0) - 1, 1)); };
  const auto neighbour = random_ids(11, 101, 99);
  const auto packed = model->hidden_states(packed_batch({neighbour, ids, neighbour}, torch::kCPU));
  return {last(whole(model, ids)),                                        // whole
          last(chunked(model, ids, /*chunk=*/13)),                        // chunked
          last(chunked(model, ids, /*chunk=*/1, /*page_size=*/2)),        // rolling
          last(packed.narrow(0, 11, static_cast<int64_t>(ids.size())))};  // packed
}

TEST(Reach, TokensBeyondTheFieldChangeNoBitAndThoseInsideDo) {
  for (const auto& [window, layers] : {std::pair<int64_t, int64_t>{8, 2}, {5, 4}, {3, 3}}) {
    Config config = tiny_config(4, 2, window);
    config.num_layers = layers;
    auto model = tiny_model(config);
    const int64_t field = layers * (window - 1), length = 2 * field + 5;
    ASSERT_EQ(field, *receptive_field(config));
    const auto ids = random_ids(length, 101, 5);
    const auto expected = last_logits(model, ids);
    int64_t inside = 0, changed = 0;
    for (int64_t distance = 0; distance < length; ++distance) {
      for (const int64_t step : {1, 50}) {
        auto other = ids;
        int64_t& token = other[static_cast<size_t>(length - 1 - distance)];
        token = (token + step) % 101;
        const auto logits = last_logits(model, other);
        for (size_t way = 0; way < logits.size(); ++way) {
          if (distance > field) {
            EXPECT_TRUE(same_bits(logits[way], expected[way])) << "window " << window << " distance " << distance;
          } else {
            ++inside;
            changed += !torch::equal(logits[way], expected[way]);
          }
        }
      }
    }
    EXPECT_GE(static_cast<double>(changed), 0.99 * static_cast<double>(inside)) << "window " << window;
  }
}

TEST(Reach, IsMeasuredExactlyInEveryWay) {
  auto model = tiny_model(tiny_config(4, 2, /*window=*/20));
  ReachOptions options;
  options.trials = 3;
  const Reach reach = measure_reach(*model, options);
  EXPECT_EQ(*reach.field, 38);
  EXPECT_EQ(reach.farthest,
            (std::map<std::string, int64_t>{{"whole", 38}, {"packed", 38}, {"chunked", 38}, {"rolling", 38}}));
  ASSERT_GT(reach.changed.size(), 40u);
  double inside = 0;
  for (size_t d = 0; d <= 38; ++d) inside += reach.changed[d];
  EXPECT_GE(inside / 39, 0.99);
  for (size_t d = 39; d < reach.changed.size(); ++d) EXPECT_EQ(reach.changed[d], 0) << d;
  const auto json = to_json(reach);
  EXPECT_EQ(json["window"], 20);
  EXPECT_EQ(json["layers"], 2);
  EXPECT_EQ(json["reach"], 38);
  EXPECT_EQ(json["changed"]["39"], 0.0);
}

TEST(Reach, WithoutAWindowEveryOutputChanges) {
  auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  ReachOptions options;
  options.trials = 1;
  options.ctx_size = 50;
  const Reach reach = measure_reach(*model, options);
  EXPECT_FALSE(reach.field.has_value());
  EXPECT_TRUE(to_json(reach)["reach"].is_null());
  EXPECT_EQ(reach.changed.size(), 50u);
  EXPECT_EQ(reach.farthest.at("rolling"), 49);
}

TEST(Reach, AShortContextEndsTheMeasurement) {
  auto model = tiny_model(tiny_config(4, 2, /*window=*/20));
  ReachOptions options;
  options.trials = 1;
  options.ctx_size = 10;
  EXPECT_EQ(measure_reach(*model, options).changed.size(), 10u);
  options.trials = 0;
  EXPECT_THROW(measure_reach(*model, options), std::invalid_argument);
}

}  // namespace
}  // namespace mixtral
