// What a caller asks of the engine, and what it gets back.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sampling.h"
#include "seats.h"
#include "trace.h"

namespace mixtral {

struct Request {
  std::vector<int64_t> prompt_token_ids;
  SamplingParams params;
  int64_t experts_per_token = 0;  // 0: as many as the model's config says
  bool trace = false;             // keep what the routers decide, in Generation::trace
  // Forces the experts of this trace of one sequence, on new tokens too, until it ends or one is another than in the
  // trace. It has the tokens of the prompt as far as both go, and gives experts_per_token.
  std::shared_ptr<const Trace> replay = nullptr;
  // Each new token, the first one too, waits until Engine::allow() has said which tokens it may be.
  bool constrained = false;
  Seat seat = nullptr;  // of Engine::reserve_seats(); submit() reserves one where there is none
};

struct Timings {
  double prefill_seconds = 0, decode_seconds = 0;  // forward passes with prompt tokens in them, and the others
  int64_t prompt_tokens = 0, new_tokens = 0;       // the first new token of each prompt comes from its prefill
  int64_t cached_tokens = 0;  // of the prompt tokens, those whose keys and values the prefix cache had
  int64_t drafted_tokens = 0, accepted_tokens = 0;  // that speculation guessed, and of them those that held
  int64_t peak_pages = 0;                           // of the key/value cache
};

struct Generation {
  std::vector<int64_t> prompt_token_ids;
  std::vector<int64_t> token_ids;      // without the end-of-sequence token
  std::string text;                    // continues the prompt's, cut before a stop string; empty without a tokenizer
  std::string finish_reason;           // "stop" (end of sequence or a stop string), "length", "cancelled", or "error"
  std::string error;                   // why, when finish_reason is "error": its logits were NaN
  std::vector<TokenLogprob> logprobs;  // one per token when asked for
  std::vector<std::optional<TokenLogprob>> prompt_logprobs;  // one per prompt token when asked for; none of the first
  std::shared_ptr<Trace> trace;  // of the tokens that the model read: all but the newest; when asked for
};

// The engine at one moment, and what it has done since it began.
struct EngineStats {
  int64_t running = 0, waiting = 0;                       // requests
  int64_t pages = 0, pages_in_use = 0, pages_cached = 0;  // all; of requests that run; of none, but in the prefix cache
  int64_t prompt_tokens = 0, generated_tokens = 0;        // of requests that were admitted
  int64_t prefix_queries = 0, prefix_hits = 0;            // prompt tokens looked for in the prefix cache, and found
  int64_t preemptions = 0;
  int64_t computed_tokens = 0;  // by forward passes, those computed again after a preemption included
  int64_t seats_taken = 0;      // by requests, and reserved for some that are still to come
};

// How a request ended. `error` is an exception that ended it, of the forward pass or of a callback; then `generation`
// holds what was generated until then.
struct Outcome {
  Generation generation;
  Timings timings;
  std::exception_ptr error;
};

// What one forward pass brought. The references hold during the call.
struct GenerationProgress {
  const std::string& text;       // that became certain
  const Generation& generation;  // so far
  size_t first_token = 0;        // of generation.token_ids: this one and those behind it are new, and their logprobs
  int64_t first_row = 0;         // the same of the rows of generation.trace->routing, when there is a trace
};

// Both are called on the engine's thread. They may submit and cancel requests, but must not wait for one.
struct Callbacks {
  // Called once per forward pass that computed tokens of the request. The text may be empty: while the prompt is read,
  // while a code point or a stop string may be incomplete, or without a tokenizer. Returning false cancels the request;
  // an exception ends it.
  std::function<bool(const GenerationProgress& progress)> on_progress;
  // Called once, after the last on_progress. Must not throw.
  std::function<void(Outcome outcome)> on_end;
};

}  // namespace mixtral
