// Work that threads share as they find time: cores of two kinds, or busy ones, are not equally fast.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

namespace mixtral::cpu {

// A line of work [0, total) that threads take from its beginning, share by share. No result may depend on which thread
// takes a share.
class SharedWork {
 public:
  struct Share {
    int64_t begin, end;
  };

  // For `threads` threads. Shares are long at first, so that a thread walks through memory in order. They become
  // shorter, down to `least`, so that all threads end together.
  SharedWork(int64_t total, int64_t threads, int64_t least) : total_(total), threads_(threads), least_(least) {}

  // Shares of one item each, for items that are large and not equally large.
  static SharedWork of_items(int64_t total) { return {total, std::numeric_limits<int64_t>::max() / 2, 1}; }

  // Any thread. Empty when nothing is left.
  Share take() {
    int64_t begin = taken_, end;
    do {
      const int64_t left = total_ - begin;
      end = begin + std::min(left, std::max(least_, left / (2 * threads_)));
    } while (!taken_.compare_exchange_weak(begin, end));
    return {begin, end};
  }

  int64_t total() const { return total_; }

 private:
  const int64_t total_, threads_, least_;
  std::atomic<int64_t> taken_{0};
};

}  // namespace mixtral::cpu
