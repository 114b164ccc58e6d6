#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>

#include "engine/passkey.h"
#include "engine/sampling.h"
#include "model/memory.h"
#include "model/rolling_kv_cache.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

const Tokenizer& demo_tokenizer() {
  static const Tokenizer tokenizer(std::filesystem::path(MIXTRAL_SOURCE_DIR) / "models/demo");
  return tokenizer;
}

Config demo_sized_config(int64_t window = 8) {
  Config config = tiny_config(4, 2, window);
  config.vocab_size = demo_tokenizer().vocab_size();
  return config;
}

TEST(Passkey, PromptsHaveTheirLengthInTokensAndTheKeyAtItsDepth) {
  const Tokenizer& tokenizer = demo_tokenizer();
  for (const auto style : {PasskeyStyle::kLandmark, PasskeyStyle::kRuler}) {
    const auto at = [&](int64_t length, double depth) {
      return passkey_prompt(tokenizer, style, length, depth, "00420", passkey_names()[0]);
    };
    int64_t shortest = shortest_passkey_prompt(tokenizer, style, 5);
    const auto has_room = [&] {
      try {
        at(shortest - 1, 0);
        return true;
      } catch (const std::invalid_argument&) {
        return false;
      }
    };
    while (has_room()) --shortest;  // other names may have more tokens
    const auto bare = at(shortest, 0);
    for (const int64_t length : {shortest, shortest + 1, shortest + 101, int64_t{1000}}) {
      for (const double depth : {0.0, 0.25, 0.5, 1.0}) {
        const int64_t room = length - shortest, before = std::llround(depth * static_cast<double>(room));
        const auto prompt = at(length, depth);
        ASSERT_EQ(static_cast<int64_t>(prompt.ids.size()), length);
        EXPECT_EQ(prompt.ids[0], tokenizer.bos_id());
        EXPECT_EQ(prompt.needle - bare.needle, before);
        EXPECT_EQ(prompt.distance - bare.distance, room - before);
        const std::vector<int64_t> behind(prompt.ids.begin() + prompt.needle, prompt.ids.end());
        EXPECT_EQ(tokenizer.decode(behind).find(style == PasskeyStyle::kLandmark
                                                    ? "The pass key is 00420. Remember it. 00420 is"
                                                    : "One of the special magic numbers for quiet-river is: 00420."),
                  0u);
        const int64_t last = length - 1 - prompt.distance;
        EXPECT_EQ(tokenizer.decode({prompt.ids.begin() + last - 1, prompt.ids.begin() + last + 1}), "20");
      }
    }
    EXPECT_EQ(tokenizer.decode(bare.answer), "00420");
    EXPECT_THROW(at(40, 0), std::invalid_argument);
  }
}

TEST(Passkey, AnswersAreComparedAsStrings) {
  const auto landmark = [](const char* answer, const char* key) {
    return passkey_found(PasskeyStyle::kLandmark, answer, key);
  };
  EXPECT_TRUE(landmark(" 00420. Remember", "00420"));
  EXPECT_FALSE(landmark(" 420. Remember", "00420"));
  EXPECT_FALSE(landmark(" 004201", "00420"));
  EXPECT_FALSE(landmark("1 00420", "00420"));  // the first number counts
  EXPECT_FALSE(landmark("none", "00420"));
  EXPECT_TRUE(landmark("00420", "00420"));
  EXPECT_TRUE(passkey_found(PasskeyStyle::kRuler, "1 004201", "00420"));
  EXPECT_FALSE(passkey_found(PasskeyStyle::kRuler, "42", "00420"));
}

TEST(Passkey, WilsonIntervalsAreThoseOfTheFormula) {
  // statsmodels.stats.proportion.proportion_confint(count, n, method="wilson")
  EXPECT_NEAR(wilson_interval(0, 10).high, 0.2775327998628892, 1e-12);
  EXPECT_EQ(wilson_interval(0, 10).low, 0);
  EXPECT_NEAR(wilson_interval(10, 10).low, 0.7224672001371106, 1e-12);
  EXPECT_NEAR(wilson_interval(10, 10).high, 1, 1e-12);
  EXPECT_NEAR(wilson_interval(3, 7).low, 0.15821985525146968, 1e-12);
  EXPECT_NEAR(wilson_interval(3, 7).high, 0.7495416354723428, 1e-12);
}

// A model that knows which token follows which, and nothing else: layers that add nothing, and one column of the hidden
// state for each token of the chain.
Mixtral bigram_model(const std::vector<std::pair<int64_t, int64_t>>& follows) {
  Config config = demo_sized_config();
  Mixtral model(config, torch::kFloat32, torch::kCPU);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters()) parameter.fill_(parameter.dim() == 1 ? 1 : 0);
  auto parameters = model->named_parameters();
  parameters["embed_tokens"].select(1, config.hidden_size - 1).fill_(1);  // of every other token
  int64_t column = 0;
  for (const auto& [token, next] : follows) {
    parameters["embed_tokens"][token].zero_();
    parameters["embed_tokens"][token][column] = 1;
    parameters["lm_head"][next][column++] = 2;
  }
  return model;
}

int64_t digit(char c) { return demo_tokenizer().encode(std::string("a") + c).back(); }

TEST(Passkey, CorrectAnswersAndTheirLogprobsAreCountedRight) {
  const Tokenizer& tokenizer = demo_tokenizer();
  // "is" is followed by a space, 0, 7 and a full stop: the key 07 is always the answer.
  const auto question = tokenizer.encode("is 07."), is = tokenizer.encode("is");
  ASSERT_EQ(question.size(), is.size() + 4);
  auto model = bigram_model({{is.back(), question[is.size()]},
                             {question[is.size()], digit('0')},
                             {digit('0'), digit('7')},
                             {digit('7'), tokenizer.encode("a.").back()}});
  PasskeyOptions options;
  options.lengths = {90};
  options.depths = 1;
  options.trials = 150;
  options.digits = 2;
  options.distances = 0;
  options.chunk_size = 512;
  const PasskeyReport report = passkey(*model, tokenizer, options);
  ASSERT_EQ(report.cells.size(), 1u);
  const PasskeyCell& cell = report.cells[0];
  EXPECT_EQ(cell.trials, 150);
  // One key of a hundred is 07, so one or two of 150. Their number also follows from the log-probabilities: a digit has
  // that of the chain's own, or one that is lower by the gap of the logits.
  EXPECT_GT(cell.correct, 0);
  EXPECT_LT(cell.correct, 8);
  const double gap = 2 * std::sqrt(static_cast<double>(model->config().hidden_size));  // the norm makes 1 of 48 that
  EXPECT_LT(cell.logprob, -0.6 * gap);  // nine of ten first digits, and as many second ones, are wrong
  EXPECT_GT(cell.logprob, -gap);
  EXPECT_EQ(report.k_max, 0);
}

TEST(Passkey, AModelThatAnswersOneDigitFindsEveryTenthKey) {
  const Tokenizer& tokenizer = demo_tokenizer();
  const auto question = tokenizer.encode("is 0"), is = tokenizer.encode("is");
  const auto stop = tokenizer.encode("a.").back();
  std::vector<std::pair<int64_t, int64_t>> follows{{is.back(), question[is.size()]}, {question[is.size()], digit('3')}};
  for (const char c : std::string("0123456789")) follows.emplace_back(digit(c), stop);
  auto model = bigram_model(follows);
  PasskeyOptions options;
  options.lengths = {90, 110};
  options.depths = 2;
  options.trials = 20;
  options.digits = 1;
  options.distances = 3;
  const PasskeyReport report = passkey(*model, tokenizer, options);
  ASSERT_EQ(report.cells.size(), 4u);
  ASSERT_EQ(report.distances.size(), 3u);
  const auto row = model->logits(whole(model, question))[static_cast<int64_t>(is.size())];
  const auto logprob_of = [&](char c) {
    return token_logprob(row.data_ptr<float>(), row.size(0), digit(c), 0).logprob;
  };
  const double right = logprob_of('3'), wrong = logprob_of('4');
  int64_t correct = 0;
  for (const auto* cells : {&report.cells, &report.distances}) {
    for (const PasskeyCell& cell : *cells) {
      correct += cell.correct;
      const double share = static_cast<double>(cell.correct) / 20;  // the mean log-probability says the same number
      EXPECT_NEAR(cell.logprob, share * right + (1 - share) * wrong, 1e-6);
    }
  }
  EXPECT_NEAR(static_cast<double>(correct), 14, 10);  // of 140
  EXPECT_EQ(report.distances.back().length, 110);
  EXPECT_EQ(report.distances.back().distance, report.cells[2].distance);
  EXPECT_LT(report.distances[0].distance, report.distances[1].distance);
}

TEST(Passkey, LogprobsAreThoseOfOnePassOverPromptAndAnswer) {
  const Tokenizer& tokenizer = demo_tokenizer();
  for (const int64_t chunk_size : {1, 7, 512}) {
    auto model = tiny_model(demo_sized_config());
    PasskeyOptions options;
    options.lengths = {101};
    options.depths = 1;
    options.trials = 1;
    options.distances = 0;
    options.chunk_size = chunk_size;
    const double logprob = passkey(*model, tokenizer, options).cells[0].logprob;
    std::mt19937_64 random(0);
    std::string key;
    for (int i = 0; i < 5; ++i) key += static_cast<char>('0' + random() % 10);
    const auto prompt = passkey_prompt(tokenizer, PasskeyStyle::kLandmark, 101, 0, key, passkey_names()[0]);
    auto ids = prompt.ids;
    ids.insert(ids.end(), prompt.answer.begin(), prompt.answer.end());
    const auto logits = model->logits(whole(model, ids));
    double sum = 0;
    for (size_t t = ids.size() - 5; t < ids.size(); ++t) {
      const auto row = logits[static_cast<int64_t>(t) - 1];
      sum += token_logprob(row.data_ptr<float>(), row.size(0), ids[t], 0).logprob;
    }
    EXPECT_DOUBLE_EQ(logprob, sum / 5);
  }
}

TEST(Passkey, KMaxEndsAtTheFirstDistanceThatFails) {
  const auto cell = [](int64_t distance, int64_t correct) { return PasskeyCell{128, 0, distance, 10, correct, -1}; };
  EXPECT_EQ(k_max({cell(10, 9), cell(20, 2), cell(30, 1), cell(40, 10)}), 20);  // a fifth is enough, less is not
  EXPECT_EQ(k_max({cell(40, 10), cell(10, 9), cell(20, 2)}), 40);               // in any order
  EXPECT_EQ(k_max({cell(10, 4), cell(20, 0), cell(20, 4)}), 20);                // one distance, two lengths
  EXPECT_EQ(k_max({cell(10, 1), cell(20, 10)}), 0);
}

TEST(Passkey, JsonHasTheFieldsOfItsSchema) {
  const PasskeyReport report{PasskeyStyle::kLandmark, 5, {{128, 0.5, 60, 10, 7, -0.5}}, {}, 60};
  const auto json = to_json(report, demo_sized_config());
  EXPECT_EQ(json["style"], "landmark");
  EXPECT_EQ(json["digits"], 5);
  EXPECT_EQ(json["k_max"], 60);
  const auto& cell = json["cells"][0];
  EXPECT_EQ(cell["length"], 128);
  EXPECT_EQ(cell["depth"], 0.5);
  EXPECT_EQ(cell["distance"], 60);
  EXPECT_EQ(cell["trials"], 10);
  EXPECT_EQ(cell["correct"], 7);
  EXPECT_EQ(cell["logprob"], -0.5);
  EXPECT_DOUBLE_EQ(cell["low"].get<double>(), wilson_interval(7, 10).low);
  EXPECT_NEAR(json["chance"].get<double>(), 1e-5, 1e-15);
  EXPECT_EQ(json["reach"], 2 * 7);
}

TEST(Passkey, ACacheBeyondKvMemoryIsRefusedBeforeTheFirstPass) {
  const Config config = demo_sized_config(/*window=*/0);
  auto model = tiny_model(config);
  PasskeyOptions options;
  options.lengths = {90, 150};
  options.depths = 1;
  options.trials = 1;
  options.distances = 0;
  int64_t passes = 0;
  options.progress = [&passes](int64_t, int64_t) { ++passes; };
  options.kv_memory = 10 * RollingKVCache::page_bytes(config, kPageSize, model->dtype());  // 150 tokens and the answer
  EXPECT_EQ(passkey(*model, demo_tokenizer(), options).cells.size(), 2u);
  EXPECT_GT(passes, 0);
  passes = 0;
  --options.kv_memory;
  EXPECT_THROW(passkey(*model, demo_tokenizer(), options), OutOfMemory);
  EXPECT_EQ(passes, 0);
}

TEST(Passkey, WrongArgumentsAreNamed) {
  const auto error_of = [](auto change) -> std::string {
    Config config = demo_sized_config();
    config.max_position = 200;
    PasskeyOptions options;
    options.lengths = {150};
    change(options);
    try {
      check_passkey(config, demo_tokenizer(), options);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(error_of([](PasskeyOptions&) {}), "");
  EXPECT_EQ(error_of([](PasskeyOptions& o) { o.lengths = {201}; }),
            "lengths must be at most 200, the longest context of the model, got 201 (ctx_size allows more)");
  EXPECT_NE(error_of([](PasskeyOptions& o) { o.lengths = {20}; }).find("got 20"), std::string::npos);
  EXPECT_NE(error_of([](PasskeyOptions& o) { o.lengths = {}; }).find("at least one"), std::string::npos);
  EXPECT_EQ(error_of([](PasskeyOptions& o) { o.trials = 0; }), "trials must be >= 1, got 0");
  EXPECT_EQ(error_of([](PasskeyOptions& o) { o.depths = 0; }), "depths must be >= 1, got 0");
  EXPECT_THROW(parse_passkey_style("needle"), std::invalid_argument);
}

}  // namespace
}  // namespace mixtral
