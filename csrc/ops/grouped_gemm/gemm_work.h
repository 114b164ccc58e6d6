// How the CPU divides a grouped GEMM. The rows of each expert are cut into chunks. The 32-column blocks of all chunks,
// one chunk after the other, are the line of work that threads share.
#pragma once

#include <utility>
#include <vector>

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
      : GemmWork(chunks_of_groups(offs, experts, chunk_rows(offs[experts - 1], blocks, threads)), blocks, threads) {}

  // Every expert has `rows` rows and a product as deep as its group in offs.
  static GemmWork of_depths(IndexArray offs, int64_t experts, int64_t rows, int64_t blocks, int64_t threads) {
    return {chunks_of_depths(offs, experts, rows, chunk_rows(rows, blocks, threads)), blocks, threads};
  }

  // Every thread calls this once. For each chunk of which the thread gets blocks, begin_chunk(expert, row, count)
  // returns a function. That is called with ranges [block_begin, block_end) of blocks, in rising order.
  template <typename BeginChunk>
  void take(const BeginChunk& begin_chunk) {
    auto share = shared_.take();
    int64_t begin = 0;  // of the chunk, on the line of all work
    for (const auto& [expert, row, count, cost] : chunks_) {
      const int64_t end = begin + blocks_ * cost;
      if (share.begin < std::min(share.end, end)) {
        auto multiply = begin_chunk(expert, row, count);
        while (share.begin < std::min(share.end, end)) {
          const int64_t stop = std::min(share.end, end);
          // A block belongs to the share in which it begins.
          multiply(ceil_div(share.begin - begin, cost), ceil_div(stop - begin, cost));
          share.begin = stop;
          if (stop == share.end) share = shared_.take();
        }
      }
      begin = end;
    }
  }

 private:
  struct Chunk {
    int64_t expert, row, count;
    int64_t cost;  // of one block, in units that all chunks share
  };

  GemmWork(std::vector<Chunk> chunks, int64_t blocks, int64_t threads)
      : chunks_(std::move(chunks)), blocks_(blocks), shared_(total(), threads, largest_cost()) {}

  static int64_t chunk_rows(int64_t rows, int64_t blocks, int64_t threads) {
    constexpr int64_t kLeast = 64, kMost = 512;
    return std::min(rows, std::clamp(ceil_div(rows, std::max<int64_t>(1, threads / blocks)), kLeast, kMost));
  }

  // Cuts `rows` of an expert from `row` on; `depth` is a factor of the cost.
  static void cut(int64_t expert, int64_t row, int64_t rows, int64_t chunk_rows, int64_t depth,
                  std::vector<Chunk>& chunks) {
    if (rows == 0) return;
    const int64_t even = ceil_div(rows, ceil_div(rows, chunk_rows));
    const int64_t chunk = ceil_div(even, kFewRows) * kFewRows;
    for (const int64_t end = row + rows; row < end; row += chunk) {
      const int64_t count = std::min(chunk, end - row);
      chunks.push_back({expert, row, count, std::max(count, kFewRows) * depth});
    }
  }

  static std::vector<Chunk> chunks_of_groups(IndexArray offs, int64_t experts, int64_t chunk_rows) {
    std::vector<Chunk> chunks;
    for (int64_t expert = 0, row = 0; expert < experts; row = offs[expert++])
      cut(expert, row, offs[expert] - row, chunk_rows, 1, chunks);
    return chunks;
  }

  static std::vector<Chunk> chunks_of_depths(IndexArray offs, int64_t experts, int64_t rows, int64_t chunk_rows) {
    constexpr int64_t kStoreDepth = 64;  // storing a result takes as long as so many products
    std::vector<Chunk> chunks;
    for (int64_t expert = 0, begin = 0; expert < experts; begin = offs[expert++])
      cut(expert, 0, rows, chunk_rows, offs[expert] - begin + kStoreDepth, chunks);
    return chunks;
  }

  int64_t total() const {
    int64_t sum = 0;
    for (const Chunk& chunk : chunks_) sum += blocks_ * chunk.cost;
    return sum;
  }

  int64_t largest_cost() const {
    int64_t largest = 1;
    for (const Chunk& chunk : chunks_) largest = std::max(largest, chunk.cost);
    return largest;
  }

  const std::vector<Chunk> chunks_;
  const int64_t blocks_;
  cpu::SharedWork shared_;
};

}  // namespace mixtral
