// How well a model predicts a text: the log-probability of every token, given those before it.
#pragma once

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "../model/defaults.h"
#include "../text/tokenizer.h"
#include "trace.h"

namespace mixtral {

class MixtralImpl;

// A text longer than the context is cut into segments of `ctx_size` tokens. Each segment gets its own BOS token and
// sees nothing of the segment before. So every token is predicted once, and BOS never.
struct ScoreOptions {
  int64_t ctx_size = 0;             // tokens of a segment; 0: the model's max_position
  int64_t chunk_size = kChunkSize;  // tokens per forward pass; it bounds the memory for logits, f32 [chunk_size,vocab]
  std::function<void(int64_t done, int64_t total)> progress;  // tokens, after each chunk; may throw to end the work
  int64_t kv_memory = 0;                                      // most bytes of keys and values; 0: as many as are needed
  Trace* trace = nullptr;         // takes the tokens that the model read, and what its routers decided; empty_trace()
  const Trace* replay = nullptr;  // forces its experts; it must be of the same tokens in segments of the same size
};

struct Score {
  int64_t tokens = 0;                    // of the text
  int64_t bytes = 0;                     // of the text
  double negative_log_likelihood = 0.0;  // nats, of all tokens together

  double nats_per_token() const { return negative_log_likelihood / static_cast<double>(tokens); }
  double perplexity() const { return std::exp(nats_per_token()); }
  double bits_per_byte() const { return negative_log_likelihood / std::log(2.0) / static_cast<double>(bytes); }
};

// ids [n], without BOS -> their natural-log probabilities [n]. They do not depend on chunk_size. Throws
// std::invalid_argument for no ids, an id outside the vocabulary, or an option out of range; OutOfMemory when the
// key/value cache does not fit; std::runtime_error when logits are NaN.
std::vector<double> token_logprobs(MixtralImpl& model, int64_t bos, const std::vector<int64_t>& ids,
                                   const ScoreOptions& options);

// The sum over all tokens of a text.
Score score(MixtralImpl& model, const Tokenizer& tokenizer, const std::string& text, const ScoreOptions& options);

}  // namespace mixtral
