// A request inside the engine: its tokens, how many of them are computed, and the text so far.
#pragma once

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
  Sequence(int64_t id, Request request, Callbacks callbacks, const std::optional<Tokenizer>& tokenizer);

  // Appends the sampled token and may finish the sequence. Returns the text that became certain; none after an
  // end-of-sequence token that nothing was held back for.
  std::optional<std::string> append(const Sample& sample, const std::vector<int64_t>& eos_token_ids);
  // Ends the sequence as it is; text held back is dropped.
  void cancel() { generation.finish_reason = "cancelled"; }

  int64_t length() const { return static_cast<int64_t>(ids.size()); }
  int64_t prompt_length() const { return static_cast<int64_t>(generation.prompt_token_ids.size()); }
  bool in_prefill() const { return computed < prompt_length(); }
  bool failed() const { return error || generation.finish_reason == "error"; }
  bool finished() const { return error || !generation.finish_reason.empty(); }

  const int64_t id;
  const SamplingParams params;
  const std::string session;
  const int64_t experts_per_token;
  const std::shared_ptr<const Trace> replay;
  const Callbacks callbacks;
  Sampler sampler;
  std::vector<int64_t> ids;    // prompt and new tokens
  int64_t computed = 0;        // of them, those whose keys and values are in the cache
  std::vector<int64_t> draft;  // guesses of the tokens after `ids`, for the next pass alone
  DraftGate gate;              // of the drafts
  bool diverged = false;       // from the tokens of `replay`
  int64_t max_pages = 0;       // the most it holds in the cache at a time
  int64_t cache_id = -1;       // of its keys and values; -1 while it waits
  int num_threads = 1;         // of the caller
  std::shared_ptr<Timings> timings = std::make_shared<Timings>();  // shared by the requests of one generate call
  Generation generation;
  std::exception_ptr error;

 private:
  std::string finish(const std::string& reason);

  StopMatcher stop_;
  std::optional<StreamingDecoder> decoder_;
  std::vector<int64_t> stop_ids_;  // of the stop strings that are the name of a control token
};

}  // namespace mixtral
