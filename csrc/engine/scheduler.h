// Decides which requests run, and how many tokens of each the next forward pass computes. First come, first served.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "sequence.h"

namespace mixtral {

// A request runs once the most pages it may ever hold fit beside those reserved for the running ones. So no running
// request ever waits for a page.
class Scheduler {
 public:
  struct Options {
    int64_t chunk_size;    // tokens of one sequence per forward pass
    int64_t token_budget;  // tokens of all sequences per forward pass
    int64_t max_batch;     // sequences running at a time
  };
  // The next `tokens` tokens of `sequence`.
  struct Chunk {
    Sequence* sequence;
    int64_t tokens;
  };

  explicit Scheduler(Options options) : options_(options) {}

  void add(Sequence& sequence) { waiting_.push_back(&sequence); }
  void remove(const Sequence& sequence);  // waiting or running

  // The request to admit next; none when all run or max_batch of them do.
  Sequence* next() const;
  // Admits next() if it fits in a pool of `pages` pages.
  bool admit(int64_t pages);

  // The next forward pass: more of a prompt, or the newest token, of as many running requests as the budget allows.
  std::vector<Chunk> plan() const;

  const std::vector<Sequence*>& running() const { return running_; }  // in the order of admission
  int64_t reserved_pages() const;                                     // of the running requests
  int64_t wanted_pages() const;  // the same once every request that may run next is admitted

 private:
  size_t free_seats() const { return static_cast<size_t>(options_.max_batch) - running_.size(); }

  Options options_;
  std::deque<Sequence*> waiting_;
  std::vector<Sequence*> running_;
};

}  // namespace mixtral
