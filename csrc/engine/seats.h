// The places of an engine for requests that wait or run, and the room for their prompts. Any thread may use them.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace mixtral {

// The engine has as many requests, or as many tokens of prompts, as it may.
struct QueueFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Seats : public std::enable_shared_from_this<Seats> {
 public:
  // One place, with the tokens of the prompt that has it. Both are free again when it is gone.
  class Taken {
   public:
    Taken() = default;
    ~Taken();
    Taken(const Taken&) = delete;
    Taken& operator=(const Taken&) = delete;

    // Adds a prompt of so many tokens. Throws QueueFull, and std::invalid_argument when there is never room for it.
    void add_prompt(int64_t tokens);

   private:
    friend class Seats;
    std::shared_ptr<Seats> seats_;  // it may outlive the engine
    int64_t tokens_ = 0;
  };

  // At most so many places, and tokens of all prompts together; 0: any number.
  Seats(int64_t most, int64_t most_tokens) : most_(most), most_tokens_(most_tokens) {}

  // All of them or none. Throws QueueFull, and std::invalid_argument when there are never as many.
  std::vector<std::shared_ptr<Taken>> reserve(int64_t count);
  int64_t taken() const;

 private:
  const int64_t most_, most_tokens_;
  mutable std::mutex mutex_;  // of what follows
  int64_t taken_ = 0, tokens_ = 0;
};

using Seat = std::shared_ptr<Seats::Taken>;

}  // namespace mixtral
