// Rotary position embedding (Su et al. 2021), with the numbers of Hugging Face:
//   angle(t, i) = float(positions[t]) * inverse_frequency[i],  inverse_frequency[i] = 1 / theta^(2i / D),  all f32
//   out[a] = x[a] * cos - x[b] * sin,  out[b] = x[b] * cos + x[a] * sin
// for i < D/2 and the pair (a, b) = (i, i + D/2), or (2i, 2i + 1) when interleaved. Cosine, sine and the rotation are
// f32, rounded once.
//
// A rotation is orthogonal, so its gradient is the rotation back: the same with -angle (rope_backward). cos is even and
// sin is odd, so negative frequencies make the same kernels rotate back.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"

namespace mixtral {

// One of q and k: x [T, heads, D] with rows `stride` elements apart, out [T, heads, D] contiguous.
template <typename T>
struct RopeTensor {
  const T* x;
  int64_t stride;
  T* out;
  int64_t heads;
};

// Tokens [begin, end). positions [T], inverse_frequency [D/2].
template <typename T>
void launch_rope_cpu(RopeTensor<T> q, RopeTensor<T> k, const int64_t* positions, const float* inverse_frequency,
                     int64_t head_dim, bool interleaved, int64_t begin, int64_t end);

// inverse_frequency lies in host memory; D/2 is at most kMaxRopePairsCuda.
inline constexpr int64_t kMaxRopePairsCuda = 256;
template <typename T>
int launch_rope_cuda(RopeTensor<T> q, RopeTensor<T> k, const int64_t* positions, const float* inverse_frequency,
                     int64_t tokens, int64_t head_dim, bool interleaved, cudaStream_t stream);

}  // namespace mixtral
