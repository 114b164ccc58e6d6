// Sixteen rows of an fp8 block (pack_weight.h) as columns, for kernels that multiply columns.
#pragma once

#include "../cpu/transpose.h"
#include "pack_weight.h"

namespace mixtral {

// Half h of the steps of a block whose rows are `depth` long, one step after the other from `step` on. A cache line of
// each row, two steps, is transposed at a time.
class Fp8Rows {
 public:
  Fp8Rows(const char* block, int64_t depth, int64_t step, int64_t h)
      : next_(block + h * kRows * depth + step * kStepDepth),
        scales_(block + kBlockRows * depth + h * kRows * static_cast<int64_t>(sizeof(float))),
        depth_(depth) {}

  // f32 [16]
  const char* scales() const { return scales_; }

  void begin_step() {
    in_line_ = !in_line_;
    if (!in_line_) return;
    constexpr int64_t kAhead = 1024;  // the processor's prefetchers do not follow sixteen rows
    const void* rows[kRows];
    for (int64_t j = 0; j < kRows; ++j) {
      rows[j] = next_ + j * depth_;
      __builtin_prefetch(next_ + j * depth_ + kAhead, 0, 2);
    }
    // After the last step of an odd number, the second half of a line is what follows in the block; it is not used.
    cpu::transpose_words(rows, columns_, kRows);
    next_ += kLine;
  }

  // Depths 4 i to 4 i + 3 of the step: e4m3 [16 columns][4].
  const char* depths(int64_t i) const { return columns_[(in_line_ ? 0 : kStepDepth / 4) + i]; }

 private:
  static constexpr int64_t kRows = 16, kLine = 2 * kStepDepth;
  const char *next_, *scales_;
  int64_t depth_;
  bool in_line_ = false;  // whether the step is the first of its line
  alignas(64) char columns_[kLine / 4][kRows * 4];
};

}  // namespace mixtral
