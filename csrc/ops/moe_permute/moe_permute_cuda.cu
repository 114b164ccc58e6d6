// A stable counting sort in two passes, without atomics and without a host synchronisation:
//   1. each warp counts the experts of its own chunk of copies;
//   2. one block turns the counts into offs and into the first row of every (chunk, expert);
//   3. each warp walks its chunk again and hands out rows in order; 4. one block per copy moves the rows.
// The chunks depend on the number of copies alone, and the result not even on that.
#include "../cuda/common.cuh"
#include "moe_permute.h"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int64_t kMaxChunks = 256, kMinChunkSize = 256;

// Copies per chunk, a multiple of the warp size.
int64_t chunk_size(int64_t copies) {
  const int64_t size = (copies + kMaxChunks - 1) / kMaxChunks;
  const int64_t rounded = (size + kWarpSize - 1) / kWarpSize * kWarpSize;
  return rounded > kMinChunkSize ? rounded : kMinChunkSize;
}

int64_t chunk_count(int64_t copies) { return (copies + chunk_size(copies) - 1) / chunk_size(copies); }

// Walks the chunk of this block (one warp). rows [chunks, E] holds, for each expert, the next value to hand out; it
// moves up by one per copy. With a row_map, every copy gets its value there, and -1 when its id is bad.
__device__ __forceinline__ void walk_chunk(IndexArray ids, int32_t* rows, int32_t* row_map, int64_t copies,
                                           int64_t chunk, int64_t experts) {
  const int lane = threadIdx.x;
  int32_t* next = rows + blockIdx.x * experts;
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < copies ? begin + chunk : copies;
  for (int64_t first = begin; first < end; first += kWarpSize) {
    const int64_t i = first + lane;
    const int64_t id = i < end ? ids[i] : -1;
    const bool valid = id >= 0 && id < experts;
    // Lanes of equal id rank by lane: stable.
    const unsigned peers = __match_any_sync(0xffffffffu, valid ? static_cast<int>(id) : -1);
    const int32_t row = valid ? next[id] + __popc(peers & ((1u << lane) - 1)) : -1;
    if (row_map && i < end) row_map[i] = row;
    __syncwarp();  // all lanes have read `next`
    const bool last_peer = (peers >> lane) == 1u;
    if (valid && last_peer) next[id] = row + 1;
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kWarpSize)
    moe_permute_count_kernel(IndexArray ids, int32_t* counts, int64_t copies, int64_t chunk, int64_t experts) {
  for (int64_t e = threadIdx.x; e < experts; e += kWarpSize) counts[blockIdx.x * experts + e] = 0;
  __syncwarp();
  walk_chunk(ids, counts, nullptr, copies, chunk, experts);
}

// counts [chunks, E] -> the first row of each chunk within its expert, in place; then all start at their expert.
__global__ void __launch_bounds__(kThreads)
    moe_permute_offsets_kernel(int32_t* counts, int32_t* offs, int64_t chunks, int64_t experts) {
  for (int64_t e = threadIdx.x; e < experts; e += kThreads) {
    int32_t sum = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      const int32_t count = counts[c * experts + e];
      counts[c * experts + e] = sum;
      sum += count;
    }
    offs[e] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t end = 0;
    for (int64_t e = 0; e < experts; ++e) offs[e] = end += offs[e];
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < chunks * experts; i += kThreads) {
    const int64_t e = i % experts;
    if (e > 0) counts[i] += offs[e - 1];
  }
}

__global__ void __launch_bounds__(kWarpSize) moe_permute_assign_kernel(IndexArray ids, int32_t* rows, int32_t* row_map,
                                                                       int64_t copies, int64_t chunk, int64_t experts) {
  walk_chunk(ids, rows, row_map, copies, chunk, experts);
}

// Block i moves copy i, and clears row i when no copy goes there: dropped copies leave the last rows over.
// Word is 16 bytes where rows allow it, else one byte; row_words counts words.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    moe_permute_copy_kernel(const Word* __restrict__ x, const int32_t* __restrict__ row_map,
                            const int32_t* __restrict__ offs, Word* __restrict__ permuted, int64_t top_k,
                            int64_t experts, int64_t row_words) {
  const int64_t i = blockIdx.x, row = row_map[i];
  if (row >= 0) {
    const Word* source = x + i / top_k * row_words;
    for (int64_t w = threadIdx.x; w < row_words; w += kThreads) permuted[row * row_words + w] = source[w];
  }
  if (i >= offs[experts - 1])
    for (int64_t w = threadIdx.x; w < row_words; w += kThreads) permuted[i * row_words + w] = Word{};
}

// A block per token; every thread sums its columns over k in order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    moe_unpermute_token_kernel(const T* __restrict__ y, const float* __restrict__ weights, IndexArray row_map,
                               T* __restrict__ out, int64_t rows, int64_t top_k, int64_t hidden) {
  const int64_t t = blockIdx.x;
  for (int64_t h = threadIdx.x; h < hidden; h += kThreads) {
    float sum = 0.0f;
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t row = row_map[t * top_k + k];
      if (row >= 0 && row < rows) sum = fmaf(weights[t * top_k + k], to_float(y[row * hidden + h]), sum);
    }
    out[t * hidden + h] = from_float<T>(sum);
  }
}

template <typename Word>
void launch_copy(const char* x, const int32_t* row_map, const int32_t* offs, char* permuted, int64_t copies,
                 int64_t top_k, int64_t experts, int64_t row_bytes, cudaStream_t stream) {
  moe_permute_copy_kernel<<<static_cast<unsigned>(copies), kThreads, 0, stream>>>(
      reinterpret_cast<const Word*>(x), row_map, offs, reinterpret_cast<Word*>(permuted), top_k, experts,
      row_bytes / static_cast<int64_t>(sizeof(Word)));
}

}  // namespace

int64_t moe_permute_scratch_size(int64_t copies, int64_t experts) { return chunk_count(copies) * experts; }

int launch_moe_permute_cuda(const char* x, IndexArray ids, char* permuted, int32_t* offs, int32_t* row_map,
                            int32_t* scratch, int64_t tokens, int64_t top_k, int64_t experts, int64_t row_bytes,
                            cudaStream_t stream) {
  const int64_t copies = tokens * top_k;
  if (copies == 0) return cudaMemsetAsync(offs, 0, experts * sizeof(int32_t), stream);
  const int64_t chunk = chunk_size(copies), chunks = chunk_count(copies);
  const unsigned blocks = static_cast<unsigned>(chunks);
  moe_permute_count_kernel<<<blocks, kWarpSize, 0, stream>>>(ids, scratch, copies, chunk, experts);
  moe_permute_offsets_kernel<<<1, kThreads, 0, stream>>>(scratch, offs, chunks, experts);
  moe_permute_assign_kernel<<<blocks, kWarpSize, 0, stream>>>(ids, scratch, row_map, copies, chunk, experts);
  // `permuted` is a fresh allocation and aligned; x may be a view.
  const bool wide = row_bytes % sizeof(uint4) == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(uint4) == 0;
  const auto copy = wide ? launch_copy<uint4> : launch_copy<char>;
  copy(x, row_map, offs, permuted, copies, top_k, experts, row_bytes, stream);
  return cudaGetLastError();
}

template <typename T>
int launch_moe_unpermute_cuda(const T* y, const float* weights, IndexArray row_map, T* out, int64_t tokens,
                              int64_t rows, int64_t top_k, int64_t hidden, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  moe_unpermute_token_kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(y, weights, row_map, out, rows,
                                                                                     top_k, hidden);
  return cudaGetLastError();
}

template int launch_moe_unpermute_cuda(const float*, const float*, IndexArray, float*, int64_t, int64_t, int64_t,
                                       int64_t, cudaStream_t);
template int launch_moe_unpermute_cuda(const BFloat16*, const float*, IndexArray, BFloat16*, int64_t, int64_t, int64_t,
                                       int64_t, cudaStream_t);
template int launch_moe_unpermute_cuda(const Half*, const float*, IndexArray, Half*, int64_t, int64_t, int64_t, int64_t,
                                       cudaStream_t);

}  // namespace mixtral
