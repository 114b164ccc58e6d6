#include <vector>

#include "../cpu/simd.h"
#include "rope.h"

namespace mixtral {
namespace {

using namespace cpu;

// The heads of one token: x, out [heads, D]; cosine, sine [D/2].
template <typename T>
void rotate_token(const T* x, T* out, int64_t heads, const float* cosine, const float* sine, int64_t pairs,
                  bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, partner = interleaved ? 1 : pairs;
  for (int64_t head = 0; head < heads; ++head, x += 2 * pairs, out += 2 * pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = to_float(x[i * step]), b = to_float(x[i * step + partner]);
      out[i * step] = from_float<T>(a * cosine[i] - b * sine[i]);
      out[i * step + partner] = from_float<T>(b * cosine[i] + a * sine[i]);
    }
  }
}

}  // namespace

template <typename T>
void launch_rope_cpu(RopeTensor<T> q, RopeTensor<T> k, const int64_t* positions, const float* inverse_frequency,
                     int64_t head_dim, bool interleaved, int64_t begin, int64_t end) {
  const int64_t pairs = head_dim / 2;
  std::vector<float> cosine(pairs), sine(pairs);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float angle = static_cast<float>(positions[t]) * inverse_frequency[i];
      cosine[i] = std::cos(angle);
      sine[i] = std::sin(angle);
    }
    for (const RopeTensor<T>& tensor : {q, k}) {
      const int64_t offset = t * tensor.heads * head_dim;
      rotate_token(tensor.x + offset, tensor.out + offset, tensor.heads, cosine.data(), sine.data(), pairs,
                   interleaved);
    }
  }
}

template void launch_rope_cpu(RopeTensor<float>, RopeTensor<float>, const int64_t*, const float*, int64_t, bool,
                              int64_t, int64_t);
template void launch_rope_cpu(RopeTensor<BFloat16>, RopeTensor<BFloat16>, const int64_t*, const float*, int64_t, bool,
                              int64_t, int64_t);
template void launch_rope_cpu(RopeTensor<Half>, RopeTensor<Half>, const int64_t*, const float*, int64_t, bool, int64_t,
                              int64_t);

}  // namespace mixtral
