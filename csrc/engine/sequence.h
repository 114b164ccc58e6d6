// A request inside the engine: its tokens, how many of them are computed, and the text so far.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../text/stop_matcher.h"
#include "../text/tokenizer.h"
#include "request.h"
#include "speculation.h"

namespace mixtral {

// The token picked after a forward pass, or why none could be picked.
struct Sample {
  int64_t token_id = -1;
  std::optional<TokenLogprob> logprob;  // when asked for
  std::string error;                    // the logits were NaN
};

class Sequence {
 public:
  // Throws std::invalid_argument for sampling parameters out of range.
  Sequence(int64_t id, Request request, Callbacks callbacks, const std::optional<Tokenizer>& tokenizer,
           const std::vector<int64_t>& eos_token_ids = {});

  // Appends the sampled token and may finish the sequence. Returns the text that became certain; none after a token
  // that ends the generation and that nothing was held back for.
  std::optional<std::string> append(const Sample& sample);
  // Ends the sequence as it is; text held back is dropped.
  void cancel() { generation.finish_reason = "cancelled"; }

  int64_t length() const { return static_cast<int64_t>(ids.size()); }
  int64_t prompt_length() const { return static_cast<int64_t>(generation.prompt_token_ids.size()); }
  bool in_prefill() const { return computed < prompt_length(); }
  // All tokens are computed, and the next one waits for its mask.
  bool blocked() const { return constrained && computed == length() && allowed.empty(); }
  bool finished() const { return error || !generation.finish_reason.empty(); }
  // Its keys and values may be wrong: no other sequence may use them.
  bool failed() const { return error || generation.finish_reason == "error"; }
  // Most tokens whose keys and values may come from the prefix cache: the newest is computed, for its logits, and so is
  // what a trace has not got yet, and a prompt whose logits are asked for.
  int64_t cacheable_tokens() const {
    if (params.prompt_logprobs > 0) return 0;
    return generation.trace ? std::min(generation.trace->tokens(), length() - 1) : length() - 1;
  }

  const int64_t id;
  const SamplingParams params;
  const int64_t experts_per_token;
  const std::shared_ptr<const Trace> replay;
  const bool constrained;
  const Callbacks callbacks;
  const std::vector<int64_t> end_ids;  // a token that ends the generation and is no part of it
  Sampler sampler;
  std::vector<int64_t> ids;        // prompt and new tokens
  int64_t computed = 0;            // of them, those whose keys and values are in the cache
  std::vector<int64_t> draft;      // guesses of the tokens after `ids`, for the next pass alone
  DraftGate gate;                  // of the drafts
  std::vector<float> held_logits;  // [vocab] of a constrained sequence's next token, until that is picked
  std::vector<int32_t> allowed;    // the mask of that token; empty: it has not come
  int64_t replayed = 0;            // of the tokens computed so far, those that `replay` begins with
  int64_t cache_id = -1;           // of its keys and values; -1 while it waits
  bool in_flight = false;          // in a pass that is not collected: it keeps its pages and does not end
  bool counted = false;            // in the totals of the scheduler
  size_t shown_tokens = 0;         // of generation.token_ids, those that on_progress had
  int64_t shown_rows = 0;          // the same of the rows of generation.trace
  int num_threads = 1;             // of the caller
  std::shared_ptr<Timings> timings = std::make_shared<Timings>();  // shared by the requests of one generate call
  Seat seat;                                                       // until it ends
  Generation generation;
  std::exception_ptr error;

 private:
  std::string finish(const std::string& reason);

  StopMatcher stop_;
  std::optional<StreamingDecoder> decoder_;
};

}  // namespace mixtral
