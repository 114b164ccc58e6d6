#include "sequence.h"

#include <algorithm>
#include <utility>

namespace mixtral {
namespace {

// The model's own unless they are ignored, those asked for, and stop strings that are the name of a control token.
std::vector<int64_t> ids_that_end(const SamplingParams& params, const std::optional<Tokenizer>& tokenizer,
                                  const std::vector<int64_t>& eos_token_ids) {
  std::vector<int64_t> ids = params.stop_token_ids;
  if (!params.ignore_eos) ids.insert(ids.end(), eos_token_ids.begin(), eos_token_ids.end());
  if (!tokenizer) return ids;
  for (const std::string& stop : params.stop)
    if (const std::optional<int64_t> control = tokenizer->control_id(stop)) ids.push_back(*control);
  return ids;
}

}  // namespace

Sequence::Sequence(int64_t id, Request request, Callbacks callbacks, const std::optional<Tokenizer>& tokenizer,
                   const std::vector<int64_t>& eos_token_ids)
    : id(id),
      params(std::move(request.params)),
      experts_per_token(request.experts_per_token),
      replay(std::move(request.replay)),
      constrained(request.constrained),
      callbacks(std::move(callbacks)),
      end_ids(ids_that_end(params, tokenizer, eos_token_ids)),
      sampler(params, request.prompt_token_ids, end_ids),
      ids(request.prompt_token_ids),
      seat(std::move(request.seat)),
      stop_(params.stop) {
  generation.prompt_token_ids = std::move(request.prompt_token_ids);
  if (params.prompt_logprobs > 0) generation.prompt_logprobs.resize(ids.size());
  if (tokenizer) decoder_.emplace(*tokenizer, /*continues_text=*/true);
}

std::optional<std::string> Sequence::append(const Sample& sample) {
  std::string text;
  if (!sample.error.empty() || std::find(end_ids.begin(), end_ids.end(), sample.token_id) != end_ids.end()) {
    generation.error = sample.error;
    text = finish(sample.error.empty() ? "stop" : "error");
    generation.text += text;
    return text.empty() ? std::nullopt : std::make_optional(text);
  }
  ids.push_back(sample.token_id);
  generation.token_ids.push_back(sample.token_id);
  if (sample.logprob) generation.logprobs.push_back(*sample.logprob);
  const auto count = static_cast<int64_t>(generation.token_ids.size());
  if (decoder_) text = decoder_->push(sample.token_id);
  if (count >= params.min_tokens) text = stop_.push(text);  // what came before is out of its reach
  if (stop_.stopped()) {
    finish("stop");
  } else if (count == params.max_tokens) {
    text += finish("length");
  }
  generation.text += text;
  return text;
}

// Returns the text held back until now. It may complete a stop string.
std::string Sequence::finish(const std::string& reason) {
  generation.finish_reason = reason;
  if (!decoder_) return "";
  std::string text = stop_.push(decoder_->flush());
  if (stop_.stopped()) generation.finish_reason = "stop";
  return text + stop_.flush();
}

}  // namespace mixtral
