#include "../cpu/simd.h"
#include "rms_norm.h"

namespace mixtral {

using namespace cpu;

template <typename T>
void launch_rms_norm_cpu(const T* x, const T* residual, const T* weight, T* out, T* sum, int64_t hidden, float eps,
                         int64_t begin, int64_t end) {
  for_cpu_isa([=] {
    const int64_t full = hidden / kLanes * kLanes;
    for (int64_t t = begin; t < end; ++t) {
      const T* row = x + t * hidden;
      if (residual) {
        T* sum_row = sum + t * hidden;
        for (int64_t h = 0; h < hidden; ++h)
          sum_row[h] = from_float<T>(to_float(row[h]) + to_float(residual[t * hidden + h]));
        row = sum_row;
      }
      Lanes squares{};
      for (int64_t h = 0; h < full; h += kLanes) {
        const Lanes value = load_lanes(row + h);
        fma_lanes(squares, value, value);
      }
      const Lanes tail = load_lanes(row + full, hidden - full);
      fma_lanes(squares, tail, tail);
      const float scale = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(hidden) + eps);
      T* out_row = out + t * hidden;
      for (int64_t h = 0; h < hidden; ++h)
        out_row[h] = from_float<T>(to_float(from_float<T>(to_float(row[h]) * scale)) * to_float(weight[h]));
    }
  });
}

template void launch_rms_norm_cpu(const float*, const float*, const float*, float*, float*, int64_t, float, int64_t,
                                  int64_t);
template void launch_rms_norm_cpu(const BFloat16*, const BFloat16*, const BFloat16*, BFloat16*, BFloat16*, int64_t,
                                  float, int64_t, int64_t);
template void launch_rms_norm_cpu(const Half*, const Half*, const Half*, Half*, Half*, int64_t, float, int64_t,
                                  int64_t);

}  // namespace mixtral
