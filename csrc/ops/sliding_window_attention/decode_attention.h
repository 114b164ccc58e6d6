// Attention of one query token a sequence over many keys, on the CPU: threads share the keys instead of the heads.
//
// A row of the cache holds the keys of all heads. Memory gives its full rate only to a thread that reads whole rows,
// one after the other. Three passes over some key blocks, a region of threads each: scores = Q K^T, and the maximum of
// each block; weights, their sums and weights V of each block, with the running maximum; and all blocks added up in
// order. The operations on a row and their order are those of sliding_window_attention_cpu.cpp, and so are the bits.
#pragma once

#include <functional>

#include "sliding_window_attention.h"

namespace mixtral {

// Calls body(begin, end) for parts of [0, count), on all threads, and waits for them.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)>;

// Whether the call has one query token a sequence, and keys enough for them.
template <typename T>
bool takes_decode_attention_cpu(const AttentionProblem<T>& problem);

template <typename T>
void decode_attention_cpu(const AttentionProblem<T>& problem, int64_t threads, const ParallelFor& parallel_for);

}  // namespace mixtral
