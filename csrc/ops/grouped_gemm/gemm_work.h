// How the CPU cuts a grouped GEMM: the rows of each expert into chunks, and the 32-column blocks of the chunks, one
// after the other, into pieces that threads take.
#pragma once

#include "../cpu/shared_work.h"
#include "../index_array.h"
#include "tiles.h"

namespace mixtral {

class GemmWork {
 public:
  static constexpr int64_t kFewRows = 32;  // multiply as fast as the weights are read

  // offs [experts], as in GroupedGemm; `blocks` of 32 columns of out. Rows are cut finer where there are fewer blocks
  // than threads.
  GemmWork(IndexArray offs, int64_t experts, int64_t blocks, int64_t threads)
      : offs_(offs),
        experts_(experts),
        blocks_(blocks),
        chunk_rows_(chunk_rows(offs[experts - 1], blocks, threads)),
        shared_(total(), threads, cost(chunk_rows_)) {}

  // Every thread calls this once. For each chunk of which it takes blocks, begin_chunk(expert, row, count) returns what
  // it then calls with ranges [block_begin, block_end) of blocks, in rising order.
  template <typename BeginChunk>
  void take(const BeginChunk& begin_chunk) {
    auto piece = shared_.take();
    int64_t begin = 0;  // of the chunk, on the line of all work
    for_each_chunk([&](int64_t expert, int64_t row, int64_t count) {
      const int64_t end = begin + blocks_ * cost(count);
      if (piece.begin < std::min(piece.end, end)) {
        auto multiply = begin_chunk(expert, row, count);
        while (piece.begin < std::min(piece.end, end)) {
          const int64_t stop = std::min(piece.end, end);
          // A block belongs to the piece in which it begins.
          multiply(ceil_div(piece.begin - begin, cost(count)), ceil_div(stop - begin, cost(count)));
          piece.begin = stop;
          if (stop == piece.end) piece = shared_.take();
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

  // Of a block of a chunk, in rows.
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
