// Defaults that more than one place needs.
#pragma once

#include <cstdint>

namespace mixtral {

inline constexpr int64_t kChunkSize = 512;     // prompt tokens of one sequence in one forward pass
inline constexpr int64_t kTokenBudget = 2048;  // tokens of all sequences in one forward pass
inline constexpr int64_t kMaxBatch = 64;       // sequences that run at the same time
inline constexpr int64_t kPageSize = 16;       // tokens in one page of the key/value cache

}  // namespace mixtral
