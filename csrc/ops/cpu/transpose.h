// Transposition of 16 x 16 blocks of 32-bit words: rows of weights or keys become columns of a matrix product. A word
// is one f32, or two neighbouring bf16 values, which gives the pair order of amx.h.
#pragma once

#include <cstdint>

namespace mixtral::cpu {

// out[i * out_stride + j] = word i of rows[j], for 16 rows of 16 words; nothing needs to be aligned.
void transpose_words(const void* const rows[16], void* out, int64_t out_stride);

}  // namespace mixtral::cpu
