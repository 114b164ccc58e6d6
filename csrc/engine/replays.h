// The sequences of a trace, each to be forced on the requests that begin as it does. No torch in here.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "trace.h"

namespace mixtral {

class Replays {
 public:
  // Throws std::invalid_argument where the positions of a sequence do not count from 0.
  explicit Replays(const Trace& trace);

  // For Request::replay: the sequence that has the tokens of `prompt` as far as both go. Of several the one that goes
  // furthest, the first of equals. Null when there is none, and for a request of another number of experts per token
  // than the trace's (0: it leaves that to the trace).
  std::shared_ptr<const Trace> find(const std::vector<int64_t>& prompt, int64_t experts_per_token = 0) const;

 private:
  std::vector<std::shared_ptr<const Trace>> sequences_;
};

// Of the tokens that a model read, those that it sent to the experts of `replay`: the ones before the first that is
// another than in the trace.
int64_t replayed_tokens(const Trace& replay, const std::vector<int64_t>& read);

}  // namespace mixtral
