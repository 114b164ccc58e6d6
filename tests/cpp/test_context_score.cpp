#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

#include "engine/context_score.h"
#include "engine/sampling.h"
#include "engine/score.h"
#include "model/memory.h"
#include "model/rolling_kv_cache.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

constexpr int64_t kBosId = 1;

Document document_of(std::vector<int64_t> ids) {
  std::vector<int64_t> bytes(ids.size(), 3);
  return {std::move(ids), std::move(bytes)};
}

std::vector<ContextScore> scores(Mixtral& model, const std::vector<Document>& documents,
                                 const std::vector<int64_t>& contexts, const std::string& protocol,
                                 const std::string& targets = "", int64_t chunk_size = 512) {
  ContextOptions options;
  options.contexts = contexts;
  options.protocol = parse_protocol(protocol);
  options.targets = parse_targets(targets, options.protocol);
  options.chunk_size = chunk_size;
  return score_contexts(*model, kBosId, documents, options).contexts;
}

// -log p of the last `count` of ids, all of them one sequence in one pass.
std::vector<double> whole_nll(Mixtral& model, const std::vector<int64_t>& ids, int64_t count) {
  const auto logits = model->logits(whole(model, {ids.begin(), ids.end() - 1}));
  std::vector<double> nll;
  for (int64_t t = logits.size(0) - count; t < logits.size(0); ++t)
    nll.push_back(
        -token_logprob(logits[t].data_ptr<float>(), logits.size(1), ids[static_cast<size_t>(t) + 1], 0).logprob);
  return nll;
}

std::vector<int64_t> behind_bos(std::vector<int64_t> ids) {
  ids.insert(ids.begin(), kBosId);
  return ids;
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

TEST(ContextScore, FixedTargetsSeeTheContextAndNothingBeforeIt) {
  const auto ids = random_ids(90, 101, 1);
  auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  const auto sequence = behind_bos(ids);
  const auto rows = scores(model, {document_of(ids)}, {5, 20, 80}, "fixed", "last:11", 7);
  ASSERT_EQ(rows.size(), 3u);
  for (const auto& row : rows) {
    // The first target is token 79, input 79 is the last before it: `context` inputs end there.
    const std::vector<int64_t> seen(sequence.begin() + 80 - row.context, sequence.end());
    EXPECT_NEAR(row.nll, mean(whole_nll(model, seen, 11)), 1e-5 * row.nll) << row.context;
    EXPECT_EQ(row.targets, 11);
  }
  EXPECT_EQ(rows[2].nll, mean(whole_nll(model, sequence, 11)));  // everything, from position 0: the same bits
  EXPECT_NE(rows[0].nll, rows[1].nll);
  EXPECT_NEAR(*rows[1].change, rows[1].nll - rows[0].nll, 1e-12);
  EXPECT_FALSE(rows[0].change.has_value());
}

TEST(ContextScore, TruncatedContextsKeepTheirPositions) {
  auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  const auto ids = random_ids(60, 101, 2);
  const auto row = scores(model, {document_of(ids)}, {10}, "fixed", "last:5")[0];
  const std::vector<int64_t> inputs(ids.begin() + 45, ids.end() - 1);  // tokens 46 to 59 of the sequence behind BOS
  Batch batch = packed_batch({inputs}, torch::kCPU);
  batch.positions.add_(46);
  const auto logits = model->logits(model->hidden_states(batch));
  double nll = 0;
  for (int64_t t = 0; t < 5; ++t)
    nll -= token_logprob(logits[9 + t].data_ptr<float>(), 101, ids[static_cast<size_t>(55 + t)], 0).logprob;
  EXPECT_DOUBLE_EQ(row.nll, nll / 5);
}

TEST(ContextScore, SlidingByOneWithTheFullContextIsFixed) {
  for (const int64_t window : {0, 8}) {
    auto model = tiny_model(tiny_config(4, 2, window));
    const auto document = document_of(random_ids(70, 101, 3));
    const auto fixed = scores(model, {document}, {70}, "fixed", "last:20")[0];
    const auto sliding = scores(model, {document}, {70}, "sliding:1", "last:20")[0];
    EXPECT_EQ(fixed.nll, sliding.nll);
    EXPECT_EQ(fixed.targets, sliding.targets);
    EXPECT_NE(scores(model, {document}, {4}, "sliding:1", "last:20")[0].nll, fixed.nll);
  }
}

TEST(ContextScore, SlidingWindowsAreThoseOfTheirDefinition) {
  auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  const auto ids = random_ids(50, 101, 4);
  const auto sequence = behind_bos(ids);
  std::vector<double> nll = whole_nll(model, {sequence.begin(), sequence.begin() + 17}, 16);
  for (int64_t begin = 16; begin < 50; begin += 6) {
    const int64_t end = std::min<int64_t>(begin + 6, 50);
    const auto scored = whole_nll(model, {sequence.begin() + end - 16, sequence.begin() + end + 1}, end - begin);
    nll.insert(nll.end(), scored.begin(), scored.end());
  }
  const auto row = scores(model, {document_of(ids)}, {16}, "sliding:6", "all")[0];
  EXPECT_EQ(row.targets, 50);
  EXPECT_NEAR(row.nll, mean(nll), 1e-6 * row.nll);
  EXPECT_NEAR(row.bits_per_byte, mean(nll) / std::log(2.0) / 3, 1e-6 * row.bits_per_byte);
}

TEST(ContextScore, MeanOfWindowMeansWeighsWindowsNotTokens) {
  auto model = tiny_model(tiny_config());
  const auto ids = random_ids(20, 101, 5);
  const auto row = scores(model, {document_of(ids)}, {16}, "disjoint")[0];
  const auto sequence = behind_bos(ids);
  const auto first = whole_nll(model, {sequence.begin(), sequence.begin() + 17}, 16);
  const auto last = whole_nll(model, {sequence.end() - 17, sequence.end()}, 4);
  EXPECT_DOUBLE_EQ(row.window_mean, (mean(first) + mean(last)) / 2);
  EXPECT_NEAR(row.nll, (16 * mean(first) + 4 * mean(last)) / 20, 1e-12);
}

TEST(ContextScore, BucketsAddUpToTheWholeText) {
  for (const int64_t limit : {8192, 48}) {
    auto config = tiny_config();
    config.max_position = limit;
    auto model = tiny_model(config);
    const auto ids = random_ids(100, 101, 6);
    const auto rows = scores(model, {document_of(ids)}, {10, 40}, "buckets", "", 9);
    ASSERT_EQ(rows.size(), 3u);
    EXPECT_EQ(rows[2].context, std::min<int64_t>(limit, 100));
    double nll = 0;
    int64_t targets = 0;
    for (const auto& row : rows) {
      nll += row.nll * static_cast<double>(row.targets);
      targets += row.targets;
      EXPECT_FALSE(row.change.has_value());  // other tokens: no pairs
    }
    EXPECT_EQ(targets, 100);
    const auto whole = token_logprobs(*model, kBosId, ids, {});
    EXPECT_NEAR(nll, -std::accumulate(whole.begin(), whole.end(), 0.0), 1e-9);
    EXPECT_NEAR(rows[0].nll * static_cast<double>(rows[0].targets) * (limit == 8192 ? 1 : 0),
                limit == 8192 ? -std::accumulate(whole.begin(), whole.begin() + 10, 0.0) : 0, 1e-9);
  }
}

TEST(ContextScore, ContextsBeyondTheReceptiveFieldGiveEqualBits) {
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
    auto model = tiny_model(tiny_config(4, 2, /*window=*/24), dtype);
    const int64_t field = *receptive_field(model->config());
    EXPECT_EQ(field, 46);
    const auto document = document_of(random_ids(300, 101, 7));
    const auto rows = scores(model, {document}, {field - 1, field + 1, field + 16, 100, 131, 277}, "fixed", "last:16");
    for (size_t i = 2; i < rows.size(); ++i) EXPECT_EQ(rows[i].nll, rows[1].nll) << rows[i].context;
    EXPECT_NE(rows[0].nll, rows[1].nll);
  }
}

TEST(ContextScore, StandardErrorsAreThoseOfTokensOrOfDocuments) {
  auto model = tiny_model(tiny_config());
  const auto ids = random_ids(40, 101, 8);
  const auto one = scores(model, {document_of(ids)}, {40}, "disjoint")[0];
  const auto nll = whole_nll(model, behind_bos(ids), 40);
  double squares = 0;
  for (const double value : nll) squares += std::pow(value - one.nll, 2);
  EXPECT_NEAR(one.standard_error, std::sqrt(squares / 39 / 40), 1e-12);

  // Two documents of unlike lengths: the ratio of sums, not the mean of means, and its linearised error.
  const auto other = random_ids(25, 101, 9);
  const auto rows = scores(model, {document_of(ids), document_of(other)}, {20, 25}, "disjoint");
  const auto sum_of = [&](const std::vector<int64_t>& text, int64_t context) {
    const auto row = scores(model, {document_of(text)}, {context}, "disjoint")[0];
    return row.nll * static_cast<double>(row.targets);
  };
  const double a = sum_of(ids, 20), b = sum_of(other, 20);
  EXPECT_NEAR(rows[0].nll, (a + b) / 65, 1e-12);
  const double residual = a - rows[0].nll * 40;
  EXPECT_NEAR(rows[0].standard_error, std::sqrt(2 * 2 * residual * residual) / 65, 1e-12);
  const double da = sum_of(ids, 25) - a, db = sum_of(other, 25) - b, change = (da + db) / 65;
  EXPECT_NEAR(*rows[1].change, change, 1e-12);
  EXPECT_NEAR(rows[1].change_error, std::sqrt(2 * (std::pow(da - change * 40, 2) + std::pow(db - change * 25, 2))) / 65,
              1e-12);
}

TEST(ContextScore, ShortDocumentsAreLeftOutAndCounted) {
  auto model = tiny_model(tiny_config());
  ContextOptions options;
  options.contexts = {30, 10, 30};
  const auto report = score_contexts(
      *model, kBosId, {document_of(random_ids(40, 101, 1)), document_of(random_ids(20, 101, 1))}, options);
  EXPECT_EQ(report.documents, 1);
  EXPECT_EQ(report.skipped, 1);
  ASSERT_EQ(report.contexts.size(), 2u);  // sorted, each once
  EXPECT_EQ(report.contexts[0].context, 10);
}

TEST(ContextScore, ACacheBeyondKvMemoryIsRefusedBeforeTheFirstPass) {
  auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  const std::vector<Document> documents = {document_of(random_ids(100, 101, 1))};
  for (const char* protocol : {"fixed", "sliding:5", "buckets", "disjoint"}) {
    ContextOptions options;
    options.contexts = {10, 60};
    options.targets = 4;
    options.protocol = parse_protocol(protocol);
    int64_t passes = 0;
    options.progress = [&passes](int64_t, int64_t) { ++passes; };
    options.kv_memory = 7 * RollingKVCache::page_bytes(model->config(), kPageSize, model->dtype());  // of 16 tokens
    EXPECT_FALSE(score_contexts(*model, kBosId, documents, options).contexts.empty()) << protocol;
    EXPECT_GT(passes, 0) << protocol;
    passes = 0;
    options.kv_memory = options.kv_memory / 7 * 3;
    EXPECT_THROW(score_contexts(*model, kBosId, documents, options), OutOfMemory) << protocol;
    EXPECT_EQ(passes, 0) << protocol;
  }
}

TEST(ContextScore, WrongArgumentsAreNamed) {
  auto config = tiny_config();
  config.max_position = 64;
  auto model = tiny_model(config);
  const auto error_of = [&](int64_t tokens, int64_t context, const std::string& protocol,
                            const std::string& targets = "") -> std::string {
    try {
      scores(model, {document_of(random_ids(tokens, 101, 1))}, {context}, protocol, targets);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(error_of(20, 30, "fixed"), "the text is shorter than the context: 20 tokens, and contexts up to 30");
  EXPECT_EQ(error_of(0, 30, "fixed"), "the text has no tokens");
  EXPECT_EQ(error_of(20, 0, "fixed"), "contexts must be > 0, got 0");
  EXPECT_EQ(error_of(80, 65, "fixed"),
            "contexts must be at most 64, the longest context of the model, got 65 (ctx_size allows more)");
  EXPECT_NE(error_of(80, 30, "sliding:31").find("the stride must be at most 30"), std::string::npos);
  for (const char* protocol : {"", "Fixed", "sliding", "sliding:", "sliding:0", "sliding:-1", "sliding:2x"})
    EXPECT_NE(error_of(80, 30, protocol).find("protocol must be fixed, sliding:S"), std::string::npos) << protocol;
  for (const char* targets : {"last", "last:", "last:0", "first:3", "3"})
    EXPECT_NE(error_of(80, 30, "fixed", targets).find("targets must be all, or last:N"), std::string::npos) << targets;
  EXPECT_EQ(parse_targets("", parse_protocol("sliding:3")), 256);
  EXPECT_EQ(parse_targets("", parse_protocol("disjoint")), 0);
}

TEST(ContextScore, DocumentsCountTheBytesOfTheirTokens) {
  const Tokenizer tokenizer(std::filesystem::path(MIXTRAL_SOURCE_DIR) / "models/demo");
  const std::string text = "In the beginning, caf\u00e9\n and \u2581.";
  const Document document = make_document(tokenizer, text);
  EXPECT_EQ(document.ids, tokenizer.encode(text));
  EXPECT_EQ(std::accumulate(document.bytes.begin(), document.bytes.end(), size_t{0}), text.size());
  const Document plain = make_document(tokenizer, "In the beginning");
  for (size_t begin = 1; begin < plain.ids.size(); ++begin) {
    const std::vector<int64_t> first(plain.ids.begin(), plain.ids.begin() + static_cast<int64_t>(begin));
    const auto bytes =
        std::accumulate(plain.bytes.begin(), plain.bytes.begin() + static_cast<int64_t>(begin), size_t{0});
    EXPECT_EQ(bytes, tokenizer.decode(first).size());
  }
  const auto pieces = cut(document, 4);
  size_t tokens = 0;
  for (const Document& piece : pieces) tokens += piece.ids.size();
  EXPECT_EQ(tokens, document.ids.size());
  EXPECT_EQ(pieces.front().ids.size(), 4u);
}

}  // namespace
}  // namespace mixtral
