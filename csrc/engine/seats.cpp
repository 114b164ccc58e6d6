#include "seats.h"

#include <string>

#include "require.h"

namespace mixtral {

std::vector<Seat> Seats::reserve(int64_t count) {
  const std::string most = std::to_string(most_);
  require(count > 0, "requests must be at least 1 at a time, got " + std::to_string(count));
  require(most_ == 0 || count <= most_,
          "requests must be at most " + most + " at a time (max_queue), got " + std::to_string(count));
  std::vector<Seat> seats;
  for (int64_t i = 0; i < count; ++i) seats.push_back(std::make_shared<Taken>());
  {
    const std::lock_guard lock(mutex_);
    if (most_ > 0 && count > most_ - taken_)
      throw QueueFull("Engine: " + std::to_string(taken_) + " of " + most + " places for requests are taken");
    taken_ += count;
  }
  for (const Seat& seat : seats) seat->seats_ = shared_from_this();
  return seats;
}

int64_t Seats::taken() const {
  const std::lock_guard lock(mutex_);
  return taken_;
}

void Seats::Taken::add_prompt(int64_t tokens) {
  const int64_t most = seats_->most_tokens_;
  require(most == 0 || tokens <= most, "prompt must have at most " + std::to_string(most) +
                                           " tokens (max_queue_tokens), got " + std::to_string(tokens));
  const std::lock_guard lock(seats_->mutex_);
  if (most > 0 && tokens > most - seats_->tokens_)
    throw QueueFull("Engine: prompts of " + std::to_string(seats_->tokens_) + " of " + std::to_string(most) +
                    " tokens wait or run, and this one has " + std::to_string(tokens));
  seats_->tokens_ += tokens;
  tokens_ += tokens;
}

Seats::Taken::~Taken() {
  if (!seats_) return;
  const std::lock_guard lock(seats_->mutex_);
  --seats_->taken_;
  seats_->tokens_ -= tokens_;
}

}  // namespace mixtral
