#include <algorithm>

#include "../cpu/simd.h"
#include "rms_norm_backward.h"

namespace mixtral {

using namespace cpu;

namespace {

// Of one row: s, and m with grad_x = s (a - x m).
struct RowFactors {
  float scale, mean;
};

template <typename T>
MIXTRAL_INLINE RowFactors row_factors(const T* grad, const T* x, const T* weight, int64_t hidden, float eps) {
  const int64_t full = hidden / kLanes * kLanes;
  Lanes squares{}, products{};
  const auto add = [&](int64_t h, int64_t count) {
    const Lanes value = load_lanes(x + h, count), upper = load_lanes(grad + h, count),
                factor = load_lanes(weight + h, count);
    Lanes scaled;
    for (int64_t j = 0; j < kLanes; ++j) scaled.v[j] = upper.v[j] * factor.v[j];
    fma_lanes(squares, value, value);
    fma_lanes(products, scaled, value);
  };
  for (int64_t h = 0; h < full; h += kLanes) add(h, kLanes);
  add(full, hidden - full);
  const float count = static_cast<float>(hidden);
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / count + eps);
  return {scale, sum_lanes(products) * scale / count * scale};
}

}  // namespace

template <typename T>
void launch_rms_norm_backward_cpu(const RmsNormBackward<T>& norm, int64_t begin, int64_t end) {
  for_cpu_isa([=] {
    const int64_t hidden = norm.hidden;
    const T* weight = norm.weight;
    for (int64_t block = begin; block < end; ++block) {
      float* sums = norm.block_sums ? norm.block_sums + block * hidden : nullptr;
      if (sums) std::fill_n(sums, hidden, 0.0f);
      for (int64_t t = block * kNormRowBlock; t < std::min(norm.rows, (block + 1) * kNormRowBlock); ++t) {
        const T *grad = norm.grad + t * hidden, *x = norm.x + t * hidden;
        const RowFactors row = row_factors(grad, x, weight, hidden, norm.eps);
        if (norm.grad_x) {
          T* out = norm.grad_x + t * hidden;
          const auto grad_x = [&](int64_t h) {
            return row.scale * (to_float(grad[h]) * to_float(weight[h]) - to_float(x[h]) * row.mean);
          };
          if (norm.grad_sum) {
            const T* grad_sum = norm.grad_sum + t * hidden;
            for (int64_t h = 0; h < hidden; ++h) out[h] = from_float<T>(grad_x(h) + to_float(grad_sum[h]));
          } else {
            for (int64_t h = 0; h < hidden; ++h) out[h] = from_float<T>(grad_x(h));
          }
        }
        if (sums) {
          for (int64_t h = 0; h < hidden; ++h) sums[h] += to_float(grad[h]) * (to_float(x[h]) * row.scale);
        }
      }
    }
  });
}

template <typename T>
void launch_rms_norm_backward_sum_cpu(float* block_sums, T* grad_weight, int64_t blocks, int64_t hidden, int64_t begin,
                                      int64_t end) {
  for_cpu_isa([=] {
    for (int64_t block = 1; block < blocks; ++block)
      for (int64_t h = begin; h < end; ++h) block_sums[h] += block_sums[block * hidden + h];
    for (int64_t h = begin; h < end; ++h) grad_weight[h] = from_float<T>(block_sums[h]);
  });
}

template void launch_rms_norm_backward_cpu(const RmsNormBackward<float>&, int64_t, int64_t);
template void launch_rms_norm_backward_cpu(const RmsNormBackward<BFloat16>&, int64_t, int64_t);
template void launch_rms_norm_backward_cpu(const RmsNormBackward<Half>&, int64_t, int64_t);
template void launch_rms_norm_backward_sum_cpu(float*, float*, int64_t, int64_t, int64_t, int64_t);
template void launch_rms_norm_backward_sum_cpu(float*, BFloat16*, int64_t, int64_t, int64_t, int64_t);
template void launch_rms_norm_backward_sum_cpu(float*, Half*, int64_t, int64_t, int64_t, int64_t);

}  // namespace mixtral
