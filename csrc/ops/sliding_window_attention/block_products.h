// The two products of attention with a block of 64 keys, by instruction set: scores = Q K^T and acc += weights V.
//
// `Stored` is the type of keys and values in these products, `Operand` that of queries and weights. bf16 keys stay bf16
// in memory; without products of bf16 they are widened in registers, where they meet f32 queries and weights. Neither
// the bits of a score nor those of a sum depend on the rows beside it.
#pragma once

#include "../cpu/isa.h"
#include "../cpu/matmul.h"

namespace mixtral {

inline constexpr int64_t kKeyBlock = 64;  // blocks start at multiples of it, in absolute positions

// Rows to be used next. In decoding each row comes from memory, once: it is fetched a block ahead, in order, a piece at
// a time, and at an even pace: a burst of requests stalls the core, and a pause leaves memory idle. The counts that
// callers pass spread two pieces for each key of a block over the steps, by the time that these take for one query
// token.
class RowsAhead {
 public:
  RowsAhead() = default;
  template <typename T>
  RowsAhead(const T* const* rows, int64_t count, int64_t row_bytes, int64_t piece_bytes)
      : row_(reinterpret_cast<const char* const*>(rows)),
        end_(row_ + count),
        row_bytes_(row_bytes),
        piece_bytes_(piece_bytes) {}

  MIXTRAL_INLINE void fetch(int64_t pieces) {
    for (; pieces > 0 && row_ < end_; --pieces) {
      for (int64_t byte = 0; byte < piece_bytes_; byte += 64) __builtin_prefetch(*row_ + piece_ + byte);
      piece_ += piece_bytes_;
      if (piece_ >= row_bytes_) {
        piece_ = 0;
        ++row_;
      }
    }
  }

 private:
  const char *const *row_ = nullptr, *const *end_ = nullptr;
  int64_t row_bytes_ = 0, piece_bytes_ = 0, piece_ = 0;  // piece_: where the next one begins
};

template <typename Stored, typename Operand>
struct BlockProducts {
  // Both fetch rows ahead meanwhile.
  // scores [rows, keys], of row stride 64, = q [rows, width] * panels: 32 or 64 keys as columns (pack_keys.h).
  void (*score)(const Operand* q, int64_t rows, int64_t width, const Stored* panels, RowsAhead& ahead, int64_t keys,
                float* scores);
  // acc [rows, width] += weights [rows, keys], of row stride 64, * values, 32 or 64 rows of `width` columns.
  void (*add_values)(const Operand* weights, int64_t rows, const Stored* const* values, RowsAhead& ahead, int64_t keys,
                     int64_t width, float* acc);
};

// Those of the instruction set in use: <float, float> and <BFloat16, float>, and <BFloat16, BFloat16> if it has
// products of bf16.
template <typename Stored, typename Operand>
BlockProducts<Stored, Operand> block_products();

}  // namespace mixtral
