#include <algorithm>
#include <filesystem>
#include <limits>
#include <stdexcept>
#include <string>

#include "engine/sampling.h"
#include "engine/score.h"
#include "io/size.h"
#include "model/memory.h"
#include "model/rolling_kv_cache.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

constexpr int64_t kBos = 1;

std::vector<double> logprobs(Mixtral& model, const std::vector<int64_t>& ids, int64_t ctx_size, int64_t chunk_size) {
  return token_logprobs(*model, kBos, ids, {ctx_size, chunk_size, nullptr});
}

// Segment by segment, each in one forward pass without a cache.
std::vector<double> expected_logprobs(Mixtral& model, const std::vector<int64_t>& ids, int64_t ctx_size) {
  std::vector<double> out;
  for (int64_t begin = 0, total = static_cast<int64_t>(ids.size()); begin < total; begin += ctx_size) {
    const std::vector<int64_t> targets(ids.begin() + begin, ids.begin() + std::min(begin + ctx_size, total));
    std::vector<int64_t> inputs = targets;
    inputs.insert(inputs.begin(), kBos);
    const auto logits = model->logits(whole(model, inputs));
    for (size_t t = 0; t < targets.size(); ++t) {
      const auto row = logits[static_cast<int64_t>(t)];
      out.push_back(token_logprob(row.data_ptr<float>(), row.size(0), targets[t], 0).logprob);
    }
  }
  return out;
}

TEST(Score, ChunksAndTheCacheDoNotChangeABit) {
  const auto ids = random_ids(50, 101, 1);
  for (const int64_t window : {0, 8}) {
    for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
      auto model = tiny_model(tiny_config(4, 2, window), dtype);
      for (const int64_t ctx_size : {1, 20, 50, 64}) {
        const auto expected = expected_logprobs(model, ids, ctx_size);
        for (const int64_t chunk_size : {1, 3, 7, 20, 512})
          EXPECT_EQ(logprobs(model, ids, ctx_size, chunk_size), expected) << ctx_size << " " << chunk_size;
      }
    }
  }
}

TEST(Score, CountsTheTokensOfTheTextAndNoBos) {
  const Tokenizer tokenizer(std::filesystem::path(MIXTRAL_SOURCE_DIR) / "models/demo");
  auto config = tiny_config();
  config.vocab_size = tokenizer.vocab_size();
  auto model = tiny_model(config);
  const std::string text = "And it came to pass in those days.";
  const auto ids = tokenizer.encode(text);
  const Score result = score(*model, tokenizer, text, {});
  EXPECT_EQ(result.tokens, static_cast<int64_t>(ids.size()));
  EXPECT_EQ(result.bytes, static_cast<int64_t>(text.size()));
  double expected = 0;
  for (const double logprob : expected_logprobs(model, ids, config.max_position)) expected -= logprob;
  EXPECT_DOUBLE_EQ(result.negative_log_likelihood, expected);
  EXPECT_DOUBLE_EQ(result.nats_per_token(), expected / static_cast<double>(ids.size()));
}

TEST(Score, ContextIsTheModelsUnlessGiven) {
  auto config = tiny_config(4, 2, /*window=*/0);
  config.max_position = 20;
  auto model = tiny_model(config);
  const auto ids = random_ids(50, 101, 1);
  EXPECT_EQ(logprobs(model, ids, 0, 512), logprobs(model, ids, 20, 512));
  EXPECT_NE(logprobs(model, ids, 0, 512), logprobs(model, ids, 50, 512));
}

TEST(Score, ProgressCountsTokensAndMayEndTheWork) {
  auto model = tiny_model(tiny_config());
  std::vector<int64_t> seen;
  const auto progress = [&](int64_t done, int64_t total) {
    EXPECT_EQ(total, 50);
    seen.push_back(done);
    if (done == 40) throw std::runtime_error("enough");
  };
  EXPECT_THROW(token_logprobs(*model, kBos, random_ids(50, 101, 1), {20, 15, progress}), std::runtime_error);
  EXPECT_EQ(seen, (std::vector<int64_t>{15, 20, 35, 40}));
}

TEST(Score, ACacheBeyondKvMemoryIsRefusedWithNumbers) {
  auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  const int64_t page = RollingKVCache::page_bytes(model->config(), kPageSize, model->dtype());
  ScoreOptions options;
  options.kv_memory = 4 * page;  // of 16 tokens
  const auto ids = random_ids(64, 101, 1), more = random_ids(65, 101, 1);
  EXPECT_EQ(token_logprobs(*model, kBos, ids, options), logprobs(model, ids, 0, 512));
  try {
    token_logprobs(*model, kBos, more, options);
    FAIL();
  } catch (const OutOfMemory& error) {
    EXPECT_EQ(std::string(error.what()), "the key/value cache: 65 tokens need " + bytes_text(5.0 * page) +
                                             ", and kv_memory is " + bytes_text(4.0 * page) +
                                             ": raise it, or give the model a shorter context");
  }
  options.ctx_size = 64;
  EXPECT_EQ(token_logprobs(*model, kBos, more, options), logprobs(model, more, 64, 512));
}

TEST(Score, WrongArgumentsAreNamed) {
  auto model = tiny_model(tiny_config());
  const auto error_of = [&](const std::vector<int64_t>& ids, int64_t ctx_size, int64_t chunk_size) -> std::string {
    try {
      logprobs(model, ids, ctx_size, chunk_size);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(error_of({}, 0, 512), "score: text must not be empty");
  EXPECT_EQ(error_of({3}, -1, 512), "score: ctx_size must be >= 0, got -1");
  EXPECT_EQ(error_of({3}, 0, 0), "score: chunk_size must be > 0, got 0");
  EXPECT_NE(error_of({3, 101}, 0, 512).find("got 101"), std::string::npos);
}

TEST(Score, NanLogitsAreAnError) {
  auto model = tiny_model(tiny_config());
  model->named_parameters()["lm_head"].fill_(std::numeric_limits<float>::quiet_NaN());
  EXPECT_THROW(logprobs(model, {3, 4}, 0, 512), std::runtime_error);
}

}  // namespace
}  // namespace mixtral
