#include "request_check.h"

#include <string>
#include <vector>

#include "require.h"

namespace mixtral {
namespace {

void check_ids_of(const SamplingParams& params, int64_t vocab) {
  const auto check = [&](const char* field, int64_t id) {
    require(id < vocab, std::string(field) + " must be of token ids in [0, " + std::to_string(vocab) + "), got " +
                            std::to_string(id));
  };
  for (const auto& bias : params.logit_bias) check("logit_bias", bias.first);
  for (const int64_t id : params.stop_token_ids) check("stop_token_ids", id);
}

void check_replay(const Request& request) {
  const Trace& replay = *request.replay;
  for (size_t i = 0; i < replay.position.size(); ++i)
    require(replay.position[i] == static_cast<int32_t>(i), "replay: the trace must be of one sequence");
  std::vector<int64_t> common = request.prompt_token_ids;
  if (static_cast<int64_t>(common.size()) > replay.tokens()) common.resize(static_cast<size_t>(replay.tokens()));
  check_same_tokens(replay, 0, common);
  require(request.experts_per_token == 0 || request.experts_per_token == replay.routing.top_k,
          "experts_per_token must be that of the trace, " + std::to_string(replay.routing.top_k) + ", got " +
              std::to_string(request.experts_per_token));
}

}  // namespace

void check_request(const Request& request, const MixtralImpl& model, int64_t ctx_size, bool has_tokenizer) {
  const SamplingParams& params = request.params;
  const auto length = static_cast<int64_t>(request.prompt_token_ids.size());
  params.validate();
  require(length > 0, "prompt must not be empty");
  model.check_ids(request.prompt_token_ids.data(), length);
  require(length <= ctx_size && params.max_tokens <= ctx_size - length,
          "prompt must fit the context of " + std::to_string(ctx_size) + " tokens with max_tokens, got " +
              std::to_string(length) + " prompt tokens and max_tokens " + std::to_string(params.max_tokens));
  check_ids_of(params, model.config().vocab_size);
  if (request.experts_per_token != 0) model.config().check_experts_per_token(request.experts_per_token);
  if (request.replay) check_replay(request);
  require(params.stop.empty() || has_tokenizer,
          "stop must be empty without a tokenizer, got " + std::to_string(params.stop.size()) + " strings");
}

}  // namespace mixtral
