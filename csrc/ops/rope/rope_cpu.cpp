#include "rope.h"
#include "rope_token_cpu.h"

namespace mixtral {

using namespace cpu;

template <typename T>
void launch_rope_cpu(RopeTensor<T> q, RopeTensor<T> k, const int64_t* positions, const float* inverse_frequency,
                     int64_t head_dim, bool interleaved, int64_t begin, int64_t end) {
  Rotation rotation(inverse_frequency, head_dim);
  for (int64_t t = begin; t < end; ++t) {
    rotation.set_position(positions[t]);
    for (const RopeTensor<T>& tensor : {q, k})
      rotation.rotate(tensor.x + t * tensor.stride, tensor.out + t * tensor.heads * head_dim, tensor.heads,
                      interleaved);
  }
}

template void launch_rope_cpu(RopeTensor<float>, RopeTensor<float>, const int64_t*, const float*, int64_t, bool,
                              int64_t, int64_t);
template void launch_rope_cpu(RopeTensor<BFloat16>, RopeTensor<BFloat16>, const int64_t*, const float*, int64_t, bool,
                              int64_t, int64_t);
template void launch_rope_cpu(RopeTensor<Half>, RopeTensor<Half>, const int64_t*, const float*, int64_t, bool, int64_t,
                              int64_t);

}  // namespace mixtral
