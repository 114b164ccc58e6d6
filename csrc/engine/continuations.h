// How likely texts are that continue others: what evaluation harnesses ask of a model.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace mixtral {

class MixtralImpl;

struct Continuation {
  std::vector<int64_t> ids;  // the context, and the continuation behind it
  int64_t begin = 1;         // of the continuation, in [1, the number of ids]
};

struct ContinuationScore {
  double logprob = 0;     // of the continuation, natural logarithm
  bool is_greedy = true;  // each of its tokens is the most likely one
};

// Many continuations share a forward pass of at most `chunk_size` tokens, which does not change the result. Throws
// std::invalid_argument for an empty context, ids outside the vocabulary, or more than the model's context and one;
// OutOfMemory when the key/value cache does not fit; std::runtime_error when logits are NaN.
std::vector<ContinuationScore> score_continuations(MixtralImpl& model, const std::vector<Continuation>& continuations,
                                                   int64_t chunk_size,
                                                   const std::function<void(int64_t done, int64_t total)>& progress);

}  // namespace mixtral
