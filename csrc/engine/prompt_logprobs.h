// Log-probabilities of the tokens of a prompt, while a forward pass reads it.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../model/libtorch.h"
#include "sequence.h"

namespace mixtral {

// A token of a prompt whose log-probability is asked for, and the row of the pass that predicts it.
struct PromptToken {
  Sequence* sequence;
  int64_t position, row;
};

// Adds those that the next `tokens` tokens of a sequence predict; they are the rows of the pass from `first_row` on.
void add_prompt_tokens(Sequence& sequence, int64_t tokens, int64_t first_row, std::vector<PromptToken>& prompt_tokens);

// Stores the log-probabilities, given logits f32 [prompt_tokens, vocab] of the rows. Returns an error for each row of
// NaN, to end its sequence with.
std::vector<std::pair<Sequence*, Sample>> set_prompt_logprobs(const std::vector<PromptToken>& prompt_tokens,
                                                              const torch::Tensor& logits);

}  // namespace mixtral
