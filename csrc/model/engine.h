// Generation: chunked prefill, then decoding a ragged batch, each sequence with its own stop.
#pragma once

#include "sampling.h"
#include "tokenizer.h"
#include "transformer.h"

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace mixtral {

struct Timings {
  double prefill_seconds = 0, decode_seconds = 0;
  int64_t prompt_tokens = 0, new_tokens = 0;
  int64_t peak_pages = 0;  // of the key/value cache
};

struct Generation {
  std::vector<int64_t> prompt_token_ids;
  std::vector<int64_t> token_ids;       // without the end-of-sequence token
  std::string text;                     // cut before a stop string; empty without a tokenizer
  std::string finish_reason;            // "stop" (end of sequence or a stop string), "length", or "cancelled"
  std::vector<TokenLogprob> logprobs;   // one per token when asked for
};

class Engine {
 public:
  struct Options {
    int64_t chunk_size = 512;  // prefill tokens of one sequence per forward pass
    int64_t page_size = 16;
    int64_t ctx_size = 0;      // longest prompt plus new tokens; 0: the model's max_position
  };
  // Called with text as it becomes certain (prompt index, piece). Returning false ends all generation ("cancelled").
  using OnText = std::function<bool(size_t index, const std::string& piece)>;

  Engine(Mixtral model, std::optional<Tokenizer> tokenizer, Options options);

  // Prompts are token ids. One SamplingParams for all, or one per prompt. Throws std::invalid_argument for an empty
  // prompt, an id outside the vocabulary, or a prompt that does not fit ctx_size with max_tokens.
  std::vector<Generation> generate(const std::vector<std::vector<int64_t>>& prompts,
                                   const std::vector<SamplingParams>& params, const OnText& on_text = nullptr,
                                   Timings* timings = nullptr);

  Mixtral& model() { return model_; }
  const std::optional<Tokenizer>& tokenizer() const { return tokenizer_; }

 private:
  Mixtral model_;
  std::optional<Tokenizer> tokenizer_;
  Options options_;
};

}  // namespace mixtral
