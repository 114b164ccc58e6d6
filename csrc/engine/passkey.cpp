#include "passkey.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "cached_sequence.h"
#include "context_score.h"
#include "require.h"
#include "sampling.h"

namespace mixtral {
namespace {

constexpr double kFoundShare = 0.2;  // of k_max

int64_t digits_of(const PasskeyOptions& options) {
  return options.digits > 0 ? options.digits : options.style == PasskeyStyle::kLandmark ? 5 : 7;
}

int64_t new_tokens_of(const PasskeyOptions& options) { return std::max<int64_t>(10, digits_of(options) + 5); }

// Keys and names: the same for the same seed on every machine.
class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}

  std::string key(int64_t digits) {
    std::string key;
    for (int64_t i = 0; i < digits; ++i) key += static_cast<char>('0' + random_() % 10);
    return key;
  }

  const std::string& name() { return passkey_names()[random_() % passkey_names().size()]; }

 private:
  std::mt19937_64 random_;
};

class Examiner {
 public:
  Examiner(MixtralImpl& model, const Tokenizer& tokenizer, const PasskeyOptions& options, int64_t total)
      : model_(model), tokenizer_(tokenizer), options_(options), draw_(options.seed), total_(total) {}

  // `depth` of the filler that a prompt of `length` tokens has, `trials` times.
  PasskeyCell cell(int64_t length, double depth) {
    PasskeyCell cell{length, depth, 0, options_.trials, 0, 0};
    int64_t digits = 0;
    for (int64_t trial = 0; trial < options_.trials; ++trial) {
      const std::string key = draw_.key(digits_of(options_));
      const PasskeyPrompt prompt = passkey_prompt(tokenizer_, options_.style, length, depth, key, draw_.name());
      cell.distance += prompt.distance;
      ask(prompt, key, cell, digits);
    }
    cell.distance /= options_.trials;
    cell.logprob /= static_cast<double>(digits);
    return cell;
  }

 private:
  // The prompt goes through the model once, then twice an answer behind it: the right one, for its log-probability, and
  // the model's own.
  void ask(const PasskeyPrompt& prompt, const std::string& key, PasskeyCell& cell, int64_t& digits) {
    const auto length = static_cast<int64_t>(prompt.ids.size());
    const int64_t new_tokens = new_tokens_of(options_);
    const int64_t longest = length + std::max(new_tokens, static_cast<int64_t>(prompt.answer.size()));
    const int64_t chunk_size = std::max(options_.chunk_size, static_cast<int64_t>(prompt.answer.size()));
    CachedSequence sequence(model_, longest, chunk_size,
                            options_.kv_memory);  // the answer is one chunk, and can be taken back
    torch::Tensor hidden;
    for (int64_t begin = 0, end = 0; begin < length; begin = end) {
      end = std::min(begin + options_.chunk_size, length);
      hidden = sequence.feed({prompt.ids.begin() + begin, prompt.ids.begin() + end});
      done_ += end - begin;
      if (options_.progress) options_.progress(done_, total_);
    }
    const auto last = model_.logits(hidden.narrow(0, hidden.size(0) - 1, 1)).to(torch::kCPU);  // [1,vocab]

    auto logits = last;
    if (prompt.answer.size() > 1) {
      const auto next = sequence.feed({prompt.answer.begin(), prompt.answer.end() - 1});
      logits = torch::cat({last, model_.logits(next).to(torch::kCPU)});
      sequence.truncate(length);
    }
    for (size_t t = 0; t < prompt.answer.size(); ++t) {
      if (!has_digit(tokenizer_, prompt.answer[t])) continue;
      cell.logprob += logprob(logits[static_cast<int64_t>(t)], prompt.answer[t]);
      ++digits;
    }
    if (passkey_found(options_.style, tokenizer_.decode(greedy(sequence, last[0], new_tokens)), key)) ++cell.correct;
  }

  double logprob(const torch::Tensor& row, int64_t id) const {
    return token_logprob(row.data_ptr<float>(), row.size(0), id, 0).logprob;
  }

  std::vector<int64_t> greedy(CachedSequence& sequence, torch::Tensor row, int64_t count) {
    const auto& ends = model_.config().eos_token_ids;
    std::vector<int64_t> ids;
    Sampler sampler(SamplingParams(), {});
    for (;;) {
      ids.push_back(sampler.next(row.data_ptr<float>(), row.size(0)));
      const bool ended = std::find(ends.begin(), ends.end(), ids.back()) != ends.end();
      if (ended || static_cast<int64_t>(ids.size()) == count) return ids;
      row = model_.logits(sequence.feed({ids.back()})).to(torch::kCPU)[0];
    }
  }

  MixtralImpl& model_;
  const Tokenizer& tokenizer_;
  const PasskeyOptions& options_;
  Draw draw_;
  int64_t done_ = 0;
  const int64_t total_;
};

double depth_of(int64_t index, int64_t depths) {
  return depths == 1 ? 0.0 : static_cast<double>(index) / static_cast<double>(depths - 1);
}

// Lengths of prompts whose needle stands first and whose distances are evenly spaced up to that of `longest`.
std::vector<int64_t> distance_lengths(int64_t shortest, int64_t longest, int64_t count) {
  std::vector<int64_t> lengths;
  for (int64_t i = 1; i <= count; ++i) lengths.push_back(shortest + (longest - shortest) * i / count);
  return lengths;
}

nlohmann::json to_json(const PasskeyCell& cell) {
  const Interval interval = wilson_interval(cell.correct, cell.trials);
  return {{"length", cell.length},   {"depth", cell.depth}, {"distance", cell.distance}, {"trials", cell.trials},
          {"correct", cell.correct}, {"low", interval.low}, {"high", interval.high},     {"logprob", cell.logprob}};
}

nlohmann::json to_json(const std::vector<PasskeyCell>& cells) {
  nlohmann::json result = nlohmann::json::array();
  for (const PasskeyCell& cell : cells) result.push_back(to_json(cell));
  return result;
}

}  // namespace

void check_passkey(const Config& config, const Tokenizer& tokenizer, const PasskeyOptions& options) {
  const auto at_least = [](const char* name, int64_t least, int64_t value) {
    require(value >= least,
            name + std::string(" must be >= ") + std::to_string(least) + ", got " + std::to_string(value));
  };
  at_least("depths", 1, options.depths);
  at_least("trials", 1, options.trials);
  at_least("digits", 0, options.digits);
  at_least("distances", 0, options.distances);
  at_least("chunk_size", 1, options.chunk_size);
  require(!options.lengths.empty(), "lengths: at least one is needed");
  const int64_t limit = options.ctx_size > 0 ? options.ctx_size : config.max_position;
  const int64_t shortest = shortest_passkey_prompt(tokenizer, options.style, digits_of(options));
  for (const int64_t length : options.lengths) {
    require(length >= shortest, "lengths must be at least " + std::to_string(shortest) +
                                    ", the tokens of the prompt without filler, got " + std::to_string(length));
    require(length <= limit, "lengths must be at most " + std::to_string(limit) +
                                 ", the longest context of the model, got " + std::to_string(length) +
                                 " (ctx_size allows more)");
  }
}

PasskeyReport passkey(MixtralImpl& model, const Tokenizer& tokenizer, const PasskeyOptions& options) {
  check_passkey(model.config(), tokenizer, options);
  const int64_t longest = *std::max_element(options.lengths.begin(), options.lengths.end());
  check_kv_memory(model, longest + new_tokens_of(options), options.chunk_size, options.kv_memory);
  const auto lengths = distance_lengths(shortest_passkey_prompt(tokenizer, options.style, digits_of(options)), longest,
                                        options.distances);
  int64_t total = 0;
  for (const int64_t length : options.lengths) total += length * options.depths * options.trials;
  for (const int64_t length : lengths) total += length * options.trials;

  Examiner examiner(model, tokenizer, options, total);
  PasskeyReport report{options.style, digits_of(options), {}, {}, 0};
  for (const int64_t length : options.lengths)
    for (int64_t i = 0; i < options.depths; ++i)
      report.cells.push_back(examiner.cell(length, depth_of(i, options.depths)));
  for (const int64_t length : lengths) report.distances.push_back(examiner.cell(length, 0));
  report.k_max = k_max(report.distances.empty() ? report.cells : report.distances);
  return report;
}

int64_t k_max(std::vector<PasskeyCell> cells) {
  std::sort(cells.begin(), cells.end(), [](const auto& a, const auto& b) { return a.distance < b.distance; });
  int64_t k = 0;
  for (size_t i = 0; i < cells.size();) {
    int64_t trials = 0, correct = 0;
    const int64_t distance = cells[i].distance;
    for (; i < cells.size() && cells[i].distance == distance; ++i) {
      trials += cells[i].trials;
      correct += cells[i].correct;
    }
    if (static_cast<double>(correct) < kFoundShare * static_cast<double>(trials)) break;
    k = distance;
  }
  return k;
}

nlohmann::json to_json(const PasskeyReport& report, const Config& config) {
  const auto field = receptive_field(config);
  return {{"style", report.style == PasskeyStyle::kLandmark ? "landmark" : "ruler"},
          {"digits", report.digits},
          {"cells", to_json(report.cells)},
          {"distances", to_json(report.distances)},
          {"k_max", report.k_max},
          {"chance", std::pow(10.0, -static_cast<double>(report.digits))},
          {"chance_logprob", -std::log(10.0)},
          {"window", config.window},
          {"reach", field ? nlohmann::json(*field) : nlohmann::json()}};
}

Interval wilson_interval(int64_t successes, int64_t trials) {
  constexpr double z = 1.959963984540054;  // the normal distribution's 97.5 % quantile
  const auto n = static_cast<double>(trials), p = static_cast<double>(successes) / n;
  const double centre = p + z * z / (2 * n), scale = 1 + z * z / n;
  const double half = z * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  return {std::max(0.0, (centre - half) / scale), std::min(1.0, (centre + half) / scale)};
}

}  // namespace mixtral
