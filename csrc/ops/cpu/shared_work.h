// Work that threads take as they find time. Cores of two kinds, or busy ones, are not equally fast.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mixtral::cpu {

// A line of work [0, total) that `threads` threads take piece by piece from its beginning. Pieces are long at first, so
// that a thread walks through memory in order, and ever shorter, down to `least`, so that all threads end together.
class SharedWork {
 public:
  struct Piece {
    int64_t begin, end;
  };

  SharedWork(int64_t total, int64_t threads, int64_t least) : total_(total), threads_(threads), least_(least) {}

  // Any thread. Empty when all is taken.
  Piece take() {
    int64_t begin = taken_, end;
    do {
      const int64_t left = total_ - begin;
      end = begin + std::min(left, std::max(least_, left / (2 * threads_)));
    } while (!taken_.compare_exchange_weak(begin, end));
    return {begin, end};
  }

 private:
  const int64_t total_, threads_, least_;
  std::atomic<int64_t> taken_{0};
};

}  // namespace mixtral::cpu
