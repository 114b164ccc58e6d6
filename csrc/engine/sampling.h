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

// Picks the tokens of one request. A random number depends on the seed and on how many were drawn before it, never on
// the batch.
class Sampler {
 public:
  // Validates `params`. `prompt_ids` matter to the repetition penalty.
  Sampler(SamplingParams params, const std::vector<int64_t>& prompt_ids);

  // logits [vocab] -> the next token. Repetition penalty, temperature, top-k, top-p and min-p are applied in this
  // order, as in Hugging Face. Then the token is drawn by inverse CDF: over the most likely tokens first after top-k or
  // top-p, else over the ids. Throws std::runtime_error when a logit is NaN or +infinity, or all are -infinity.
  // `allowed` is a mask of ceil(vocab / 32) words: bit i % 32 of word i / 32 allows token i. Empty: all are allowed.
  int64_t next(const float* logits, int64_t vocab, const std::vector<int32_t>& allowed = {});

  // The parts of next(), for sample_batch.h, which picks the tokens of a whole batch.
  const SamplingParams& params() const { return params_; }
  const std::unordered_set<int64_t>& seen() const { return seen_; }
  double uniform() const;    // the random number for the next token, in [0, 1)
  void take(int64_t token);  // the next token is this one

 private:
  std::vector<Candidate> candidates(const std::vector<float>& scores, float highest) const;
  int64_t draw(const std::vector<Candidate>& candidates) const;

  SamplingParams params_;
  std::unordered_set<int64_t> seen_;  // ids under the repetition penalty
  uint64_t seed_;
  uint64_t drawn_ = 0;  // tokens
};

}  // namespace mixtral
