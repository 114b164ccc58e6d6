#include "event_box.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <iterator>
#include <system_error>
#include <utility>

namespace mixtral {
namespace {

// Appends what a vector has from `begin` on.
template <typename T>
void append_from(const std::vector<T>& from, size_t begin, std::vector<T>& to) {
  if (begin < from.size()) to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(begin), from.end());
}

void append_rows(const Routing& routing, int64_t first_row, Event& event) {
  event.layers = routing.layers;
  event.top_k = routing.top_k;
  const auto begin = static_cast<size_t>(first_row * routing.layers * routing.top_k);
  append_from(routing.topk_ids, begin, event.routed_ids);
  append_from(routing.topk_weights, begin, event.routed_weights);
}

}  // namespace

EventBox::EventBox() : fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

EventBox::~EventBox() { ::close(fd_); }

Callbacks EventBox::callbacks(int64_t key) {
  const auto box = shared_from_this();
  const auto place = std::make_shared<Place>(Place{key});
  Callbacks callbacks;
  callbacks.on_progress = [box, place](const GenerationProgress& progress) {
    box->add_progress(*place, progress);
    return true;
  };
  callbacks.on_end = [box, place](Outcome outcome) { box->add_end(*place, std::move(outcome)); };
  return callbacks;
}

void EventBox::wake() {
  {
    const std::lock_guard lock(mutex_);
    if (events_.empty() || std::exchange(woken_, true)) return;
  }
  const uint64_t one = 1;
  (void)!::write(fd_, &one, sizeof one);  // it cannot fail: the counter is far from full
}

std::vector<Event> EventBox::take() {
  uint64_t count = 0;
  (void)!::read(fd_, &count, sizeof count);  // 0 again; it fails when it was
  std::vector<Event> events;
  const std::lock_guard lock(mutex_);
  events.swap(events_);
  events_.reserve(events.size());
  ++round_;
  woken_ = false;
  return events;
}

void EventBox::add_progress(Place& place, const GenerationProgress& progress) {
  const Generation& generation = progress.generation;
  const bool tells = !progress.text.empty() || progress.first_token < generation.token_ids.size() || generation.trace;
  if (!tells) return;  // more of the prompt was read
  const std::lock_guard lock(mutex_);
  Event& event = event_of(place);
  event.text += progress.text;
  append_from(generation.token_ids, progress.first_token, event.token_ids);
  append_from(generation.logprobs, progress.first_token, event.logprobs);
  if (progress.first_token == 0 && !generation.token_ids.empty()) event.prompt_logprobs = generation.prompt_logprobs;
  if (generation.trace) append_rows(generation.trace->routing, progress.first_row, event);
}

void EventBox::add_end(Place& place, Outcome outcome) {
  auto ended = std::make_unique<Outcome>(std::move(outcome));
  const std::lock_guard lock(mutex_);
  event_of(place).outcome = std::move(ended);
}

// With the mutex held.
Event& EventBox::event_of(Place& place) {
  if (place.round != round_) {
    events_.emplace_back().key = place.key;
    place.round = round_;
    place.index = events_.size() - 1;
  }
  return events_[place.index];
}

}  // namespace mixtral
