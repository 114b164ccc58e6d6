#include "prompt_logprobs.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../model/parallel.h"

namespace mixtral {

void add_prompt_tokens(Sequence& sequence, int64_t tokens, int64_t first_row, std::vector<PromptToken>& prompt_tokens) {
  if (sequence.params.prompt_logprobs == 0) return;
  const int64_t count = std::min(tokens, sequence.prompt_length() - 1 - sequence.computed);
  for (int64_t i = 0; i < count; ++i) prompt_tokens.push_back({&sequence, sequence.computed + i + 1, first_row + i});
}

std::vector<std::pair<Sequence*, Sample>> set_prompt_logprobs(const std::vector<PromptToken>& prompt_tokens,
                                                              const torch::Tensor& logits) {
  const auto rows = logits.to(torch::kCPU).contiguous();
  const int64_t vocab = rows.size(1);
  std::vector<std::string> errors(prompt_tokens.size());
  parallel_for(rows.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Sequence& sequence = *prompt_tokens[static_cast<size_t>(i)].sequence;
      const auto position = static_cast<size_t>(prompt_tokens[static_cast<size_t>(i)].position);
      try {
        sequence.generation.prompt_logprobs[position] = token_logprob(
            rows.data_ptr<float>() + i * vocab, vocab, sequence.ids[position], sequence.params.prompt_logprobs);
      } catch (const std::runtime_error& error) {
        errors[static_cast<size_t>(i)] = error.what();
      }
    }
  });
  std::vector<std::pair<Sequence*, Sample>> result;
  for (size_t i = 0; i < errors.size(); ++i)
    if (!errors[i].empty()) result.emplace_back(prompt_tokens[i].sequence, Sample{-1, std::nullopt, errors[i]});
  return result;
}

}  // namespace mixtral
