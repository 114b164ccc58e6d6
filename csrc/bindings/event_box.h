// What the engine's thread tells a server: the progress of all requests, in one box that a loop empties.
//
// The engine's thread never waits for the reader, nor for Python's GIL. One write to an eventfd wakes the reader after
// a forward pass, and what a slow reader leaves in the box is merged, one event per request.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../engine/request.h"

namespace mixtral {

// What happened to one request since the box was emptied.
struct Event {
  int64_t key = 0;   // that the reader gave the request
  std::string text;  // that became certain: whole code points
  std::vector<int64_t> token_ids;
  std::vector<TokenLogprob> logprobs;                        // one per token when asked for
  std::vector<std::optional<TokenLogprob>> prompt_logprobs;  // beside the first new token, when asked for
  // Of the tokens that the model read, prompt and new ones, when asked for; each has [L,K] values.
  std::vector<uint8_t> routed_ids;
  std::vector<uint16_t> routed_weights;  // bits of f16
  int64_t layers = 0, top_k = 0;         // of the routed rows
  std::unique_ptr<Outcome> outcome;      // the request has ended
};

class EventBox : public std::enable_shared_from_this<EventBox> {
 public:
  EventBox();  // throws std::system_error when there is no file descriptor left
  ~EventBox();
  EventBox(const EventBox&) = delete;
  EventBox& operator=(const EventBox&) = delete;

  // Callbacks that put the events of a request into the box. They keep the box alive.
  Callbacks callbacks(int64_t key);
  // Wakes the reader, if there is something for it that it has not been woken for.
  void wake();

  // Readable while there are events to take; for poll, epoll and the like.
  int fd() const { return fd_; }
  // Empties the box. Events come in the order in which their requests first had one.
  std::vector<Event> take();

 private:
  // Where the event of a request is, when it was put there since the box was emptied for the `round`-th time.
  struct Place {
    int64_t key;
    uint64_t round = 0;
    size_t index = 0;
  };

  void add_progress(Place& place, const GenerationProgress& progress);
  void add_end(Place& place, Outcome outcome);
  Event& event_of(Place& place);

  const int fd_;
  std::mutex mutex_;  // of everything below
  std::vector<Event> events_;
  uint64_t round_ = 1;
  bool woken_ = false;  // since the box was emptied
};

}  // namespace mixtral
