// Generation: chunked prefill, then decoding a ragged batch, each sequence with its own stop.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../model/defaults.h"
#include "../model/transformer.h"
#include "../text/tokenizer.h"
#include "sampling.h"

namespace mixtral {

struct Timings {
  double prefill_seconds = 0, decode_seconds = 0;  // forward passes with prompt tokens in them, and the others
  int64_t prompt_tokens = 0, new_tokens = 0;       // the first new token of each prompt comes from its prefill
  int64_t peak_pages = 0;                          // of the key/value cache
};

struct Generation {
  std::vector<int64_t> prompt_token_ids;
  std::vector<int64_t> token_ids;      // without the end-of-sequence token
  std::string text;                    // continues the prompt's, cut before a stop string; empty without a tokenizer
  std::string finish_reason;           // "stop" (end of sequence or a stop string), "length", "cancelled", or "error"
  std::string error;                   // why, when finish_reason is "error": its logits were NaN
  std::vector<TokenLogprob> logprobs;  // one per token when asked for
};

class Engine {
 public:
  struct Options {
    int64_t chunk_size = kChunkSize;      // prefill tokens of one sequence per forward pass
    int64_t token_budget = kTokenBudget;  // tokens of all sequences per forward pass
    int64_t max_batch = kMaxBatch;        // sequences at a time; further prompts wait for one to finish
    int64_t page_size = kPageSize;
    int64_t ctx_size = 0;    // longest prompt plus new tokens; 0: the model's max_position
    bool cuda_graph = true;  // on CUDA, decode in graphs (decode_graphs.h)
  };
  // Called once per sequence and forward pass with the text that became certain (prompt index, piece). The piece may be
  // empty: while a prompt is read, while a code point or a stop string may be incomplete, or without a tokenizer.
  // Returning false ends all generation ("cancelled").
  using OnText = std::function<bool(size_t index, const std::string& piece)>;

  // Throws std::invalid_argument when an option is out of range.
  Engine(Mixtral model, std::optional<Tokenizer> tokenizer, Options options);

  // Prompts are token ids. One SamplingParams for all, or one per prompt. Throws std::invalid_argument for an empty
  // prompt, an id outside the vocabulary, a prompt that does not fit ctx_size with max_tokens, or stop strings without
  // a tokenizer; OutOfMemory when the key/value cache does not fit.
  std::vector<Generation> generate(const std::vector<std::vector<int64_t>>& prompts,
                                   const std::vector<SamplingParams>& params, const OnText& on_text = nullptr,
                                   Timings* timings = nullptr);

  Mixtral& model() { return model_; }
  const std::optional<Tokenizer>& tokenizer() const { return tokenizer_; }

 private:
  void check_request(const std::vector<int64_t>& prompt, const SamplingParams& params) const;

  Mixtral model_;
  std::optional<Tokenizer> tokenizer_;
  Options options_;
};

}  // namespace mixtral
