// How the CPU divides a grouped GEMM. The rows of each expert are cut into chunks. The 32-column blocks of all chunks,
// one chunk after the other, are the line of work that threads share.
#pragma once

#include "../cpu/shared_work.h"
#include "../index_array.h"
#include "tiles.h"

namespace mixtral {

class GemmWork {
 public:
  static constexpr int64_t kFewRows = 32;  // up to so many, a product takes as long as reading the weights

  // offs [experts], as in GroupedGemm; `blocks` of 32 columns of out. With fewer blocks than threads, chunks have fewer
  // rows.
  GemmWork(IndexArray offs, int64_t experts, int64_t blocks, int64_t threads)
      : offs_(offs),
        experts_(experts),
        blocks_(blocks),
        chunk_rows_(chunk_rows(offs[experts - 1], blocks, threads)),
        shared_(total(), threads, cost(chunk_rows_)) {}

  // Every thread calls this once. For each chunk of which the thread gets blocks, begin_chunk(expert, row, count)
  // returns a function. That is called with ranges [block_begin, block_end) of blocks, in rising order.
  template <typename BeginChunk>
  void take(const BeginChunk& begin_chunk) {
    auto share = shared_.take();
    int64_t begin = 0;  // of the chunk, on the line of all work
    for_each_chunk([&](int64_t expert, int64_t row, int64_t count) {
      const int64_t end = begin + blocks_ * cost(count);
      if (share.begin < std::min(share.end, end)) {
        auto multiply = begin_chunk(expert, row, count);
        while (share.begin < std::min(share.end, end)) {
          const int64_t stop = std::min(share.end, end);
          // A block belongs to the share in which it begins.
          multiply(ceil_div(share.begin - begin, cost(count)), ceil_div(stop - begin, cost(count)));
          share.begin = stop;
          if (stop == share.end) share = shared_.take();
        }
      }
      begin = end;
    });
  }

 private:
  static int64_t chunk_rows(int64_t rows, int64_t blocks, int64_t threads) {
    constexpr int64_t kLeast = 64, kMost = 512;
    return std::min(rows, std::clamp(ceil_div(rows, std::max<int64_t>(1, threads / blocks)), kLeast, kMost));
  }

  // Of one block of a chunk of `count` rows, in units of rows.
  static int64_t cost(int64_t count) { return std::max(count, kFewRows); }

  // Calls visit(expert, row, count) for chunks of the rows of each expert.
  template <typename Visit>
  void for_each_chunk(const Visit& visit) const {
    int64_t row = 0;
    for (int64_t expert = 0; expert < experts_; ++expert) {
      const int64_t end = offs_[expert], rows = end - row;
      if (rows == 0) continue;
      const int64_t even = ceil_div(rows, ceil_div(rows, chunk_rows_));
      const int64_t chunk = ceil_div(even, kFewRows) * kFewRows;
      for (; row < end; row += chunk) visit(expert, row, std::min(chunk, end - row));
      row = end;
    }
  }

  int64_t total() const {
    int64_t sum = 0;
    for_each_chunk([&](int64_t, int64_t, int64_t count) { sum += blocks_ * cost(count); });
    return sum;
  }

  const IndexArray offs_;
  const int64_t experts_, blocks_, chunk_rows_;
  cpu::SharedWork shared_;
};

}  // namespace mixtral
