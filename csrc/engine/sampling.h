// From a row of logits to the next token.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace mixtral {

struct SamplingParams {
  int64_t max_tokens = 64;
  double temperature = 0.0;         // 0: greedy, first index on ties
  double top_p = 1.0;               // (0, 1]
  int64_t top_k = 0;                // 0: off
  double min_p = 0.0;               // [0, 1], relative to the most probable token
  double repetition_penalty = 1.0;  // > 0, as in CTRL (Keskar et al. 2019): over prompt and generated ids
  std::optional<uint64_t> seed;     // none: taken from the operating system
  std::vector<std::string> stop;    // generation ends before any of these
  int64_t logprobs = 0;             // 0: none; n: of the chosen token and of the n most likely, n <= 20
  bool ignore_eos = false;

  // Throws std::invalid_argument: "<field> must be ..., got ...".
  void validate() const;
};

struct TokenLogprob {
  int64_t token_id = 0;
  double logprob = 0;                           // natural log, of the raw logits
  std::vector<std::pair<int64_t, double>> top;  // falling, ties to the smaller id
};

// Log-softmax of the raw logits [vocab] at `token_id`, with the `top` most likely tokens.
// Throws std::runtime_error as Sampler::next does, std::out_of_range for an id outside [0, vocab).
TokenLogprob token_logprob(const float* logits, int64_t vocab, int64_t token_id, int64_t top);

struct Candidate {
  int64_t id;
  double weight;  // proportional to the probability; 1 for the most likely token
};

// One request's state. The random numbers depend on the seed and the step alone, never on the batch.
class Sampler {
 public:
  // Validates `params`. `prompt_ids` matter to the repetition penalty.
  Sampler(SamplingParams params, const std::vector<int64_t>& prompt_ids);

  // logits [vocab]. Repetition penalty, temperature, top-k, top-p and min-p are applied in this order, as in Hugging
  // Face. What is left is walked through, most likely tokens first after top-k or top-p, else by id, until the share of
  // its weight is uniform(). Throws std::runtime_error when a logit is NaN or +infinity, or all are -infinity.
  int64_t next(const float* logits, int64_t vocab);

  // What next() is made of, for whoever picks the tokens of a batch at once (sample_batch.h).
  const SamplingParams& params() const { return params_; }
  const std::unordered_set<int64_t>& seen() const { return seen_; }
  double uniform() const;    // this step's, in [0, 1)
  void take(int64_t token);  // ends the step

 private:
  std::vector<Candidate> candidates(const std::vector<float>& scores, float highest) const;
  int64_t draw(const std::vector<Candidate>& candidates) const;

  SamplingParams params_;
  std::unordered_set<int64_t> seen_;  // ids under the repetition penalty
  uint64_t seed_;
  uint64_t step_ = 0;
};

// Finds stop strings in streamed text: holds back what may be the beginning of one. Where the text is cut does not
// depend on the pieces it came in: the stop string that ends first wins, of several the longest.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stop) : stop_(std::move(stop)) {}
  // Text that is safe to show. After a match `stopped()` is true and nothing more comes out.
  std::string push(const std::string& text);
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stop_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace mixtral
