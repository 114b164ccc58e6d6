#include "sequence.h"

#include <algorithm>
#include <utility>

namespace mixtral {

Sequence::Sequence(int64_t id, Request request, Callbacks callbacks, const std::optional<Tokenizer>& tokenizer)
    : id(id),
      params(std::move(request.params)),
      session(std::move(request.session)),
      experts_per_token(request.experts_per_token),
      replay(std::move(request.replay)),
      constrained(request.constrained),
      callbacks(std::move(callbacks)),
      sampler(params, request.prompt_token_ids),
      ids(request.prompt_token_ids),
      stop_(params.stop) {
  generation.prompt_token_ids = std::move(request.prompt_token_ids);
  if (!tokenizer) return;
  decoder_.emplace(*tokenizer, /*continues_text=*/true);
  for (const std::string& stop : params.stop) {
    if (const std::optional<int64_t> control = tokenizer->control_id(stop)) stop_ids_.push_back(*control);
  }
}

std::optional<std::string> Sequence::append(const Sample& sample, const std::vector<int64_t>& eos_token_ids) {
  std::string text;
  const auto is_in = [&](const std::vector<int64_t>& ids) {
    return std::find(ids.begin(), ids.end(), sample.token_id) != ids.end();
  };
  if (!sample.error.empty() || is_in(stop_ids_) || (!params.ignore_eos && is_in(eos_token_ids))) {
    generation.error = sample.error;
    text = finish(sample.error.empty() ? "stop" : "error");
    generation.text += text;
    return text.empty() ? std::nullopt : std::make_optional(text);
  }
  ids.push_back(sample.token_id);
  generation.token_ids.push_back(sample.token_id);
  if (sample.logprob) generation.logprobs.push_back(*sample.logprob);
  if (decoder_) text = stop_.push(decoder_->push(sample.token_id));
  if (stop_.stopped()) {
    finish("stop");
  } else if (static_cast<int64_t>(generation.token_ids.size()) == params.max_tokens) {
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
