// From a row of logits to the next token.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
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
  // As in OpenAI's API, [-2, 2]: subtracted from the logit of a generated token, once and once for each occurrence.
  double presence_penalty = 0.0, frequency_penalty = 0.0;
  std::map<int64_t, double> logit_bias;  // token id -> [-100, 100], added to its logit
  std::optional<uint64_t> seed;          // none: taken from the operating system
  std::vector<std::string> stop;         // generation ends before any of these
  std::vector<int64_t> stop_token_ids;   // these end it too, whether or not ignore_eos is set
  int64_t min_tokens = 0;       // until then no token that would end the generation comes, nor does `stop` end it
  int64_t logprobs = 0;         // 0: none; n: of the chosen token and of the n most likely, n <= 20
  int64_t prompt_logprobs = 0;  // the same of the tokens of the prompt
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

// The seed of sample `index` of several of one prompt: `seed` itself for the first one, Philox numbers for the others.
uint64_t sample_seed(uint64_t seed, int64_t index);

// What penalties and bias make of the logit of one token.
struct Adjustment {
  float penalty = 1;  // a negative logit is multiplied by it, another one divided
  float offset = 0;   // added then
  int64_t count = 0;  // of the token in what was generated
};

// Picks the tokens of one request. The random number of a token depends on the seed and on the token's position in the
// sequence alone: not on the batch, nor on whether the tokens before it are prompt or generated.
class Sampler {
 public:
  // Validates `params`. `end_ids` would end the generation: they do not come before min_tokens.
  Sampler(SamplingParams params, const std::vector<int64_t>& prompt_ids, std::vector<int64_t> end_ids = {});

  // logits [vocab] -> the next token. Applied in this order, each step as Hugging Face has it if it does: repetition
  // penalty, presence and frequency penalty and bias, min_tokens and mask, temperature, top-k, top-p, min-p. The token
  // is drawn by inverse CDF then: over the most likely tokens first after top-k or top-p, else over the ids. Throws
  // std::runtime_error when a logit is NaN or +infinity, or all are -infinity.
  // `allowed` is a mask of ceil(vocab / 32) words: bit i % 32 of word i / 32 allows token i. Empty: all are allowed.
  int64_t next(const float* logits, int64_t vocab, const std::vector<int32_t>& allowed = {});

  // The parts of next(), for sample_batch.h, which picks the tokens of a whole batch.
  const SamplingParams& params() const { return params_; }
  const std::unordered_map<int64_t, Adjustment>& adjustments() const { return adjustments_; }  // by token id
  const std::vector<int64_t>& banned() const;  // ids that the next token may not be
  double uniform() const;                      // the random number for the next token, in [0, 1)
  void take(int64_t token);                    // the next token is this one

 private:
  void adjust(std::vector<float>& scores) const;
  std::vector<Candidate> candidates(const std::vector<float>& scores, float highest) const;
  int64_t draw(const std::vector<Candidate>& candidates) const;

  SamplingParams params_;
  std::unordered_map<int64_t, Adjustment> adjustments_;
  std::vector<int64_t> end_ids_;
  uint64_t seed_;
  int64_t prompt_length_, generated_ = 0;
};

}  // namespace mixtral
