#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "dequantize.h"
#include "pack_weight.h"
#include "packed_value.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr float kSqrt2 = 1.41421356f;
constexpr float kLargest = 0x1p66f;        // that a scale of int4 reaches
constexpr double kClearlyLess = 0.999999;  // so that a rounding error decides nothing

// rows [32, depth]
template <typename T>
MIXTRAL_INLINE void quantize_int8(const T* rows, int64_t depth, char* block) {
  for (int64_t j = 0; j < kBlockRows; ++j) {
    const T* row = rows + j * depth;
    float largest = 0;
    for (int64_t d = 0; d < depth; ++d) largest = std::max(largest, std::abs(to_float(row[d])));
    const float scale = largest / 127, divisor = scale > 0 ? scale : 1;
    std::memcpy(block + kBlockRows * depth + j * sizeof scale, &scale, sizeof scale);
    for (int64_t k = 0; k < depth; k += kStepDepth) {
      int8_t q[kStepDepth];
      for (int64_t d = 0; d < kStepDepth; ++d)
        q[d] = static_cast<int8_t>(std::clamp(std::nearbyint(to_float(row[k + d]) / divisor), -127.0f, 127.0f));
      for (int64_t d = 0; d < kStepDepth; ++d) block[k * kBlockRows + pair_index(j, d)] = static_cast<char>(q[d]);
    }
  }
}

// 32 depths of a row at one int4 scale: q + 8 of each, and the squared error of all.
struct Int4Group {
  uint8_t levels[kStepDepth];
  double error;
};

MIXTRAL_INLINE Int4Group quantize_group(const float* values, int scale) {
  const float s = std::ldexp(scale % 2 == 1 ? kSqrt2 : 1.0f, scale / 2 - 64);
  Int4Group group;
  double errors[kStepDepth];
  for (int64_t d = 0; d < kStepDepth; ++d) {
    const float level = std::clamp(std::floor(values[d] / s) + 8, 0.0f, 15.0f);
    group.levels[d] = static_cast<uint8_t>(level);
    const double error = static_cast<double>(values[d]) - static_cast<double>(s) * (level - 7.5f);
    errors[d] = error * error;
  }
  group.error = std::accumulate(errors, errors + kStepDepth, 0.0);
  return group;
}

// The smallest scale whose outermost level reaches `largest`.
int covering_scale(float largest) {
  if (largest == 0) return 0;
  int exponent;
  const float fraction = std::frexp(largest / 7.5f, &exponent);  // in [1/2, 1)
  return std::clamp(2 * (exponent + 64) - (fraction <= kSqrt2 / 2 ? 1 : 0), 0, 255);
}

// rows [32, depth]. A smaller scale cuts the largest values and is finer for the others: of three the best is taken.
template <typename T>
MIXTRAL_INLINE void quantize_int4(const T* rows, int64_t depth, char* block) {
  for (int64_t k = 0; k < depth; k += kStepDepth, block += kInt4StepBytes) {
    uint8_t levels[kStepElements];  // in pair order
    for (int64_t j = 0; j < kBlockRows; ++j) {
      float values[kStepDepth], largest = 0;
      for (int64_t d = 0; d < kStepDepth; ++d) {
        values[d] = to_float(rows[j * depth + k + d]);
        largest = std::max(largest, std::abs(values[d]));
      }
      const int covering = covering_scale(largest);
      int scale = covering;
      Int4Group best = quantize_group(values, scale);
      for (int smaller = covering - 1; smaller >= std::max(0, covering - 2); --smaller) {
        const Int4Group group = quantize_group(values, smaller);
        if (group.error < kClearlyLess * best.error) {
          best = group;
          scale = smaller;
        }
      }
      block[j] = static_cast<char>(scale);
      for (int64_t d = 0; d < kStepDepth; ++d) levels[pair_index(j, d)] = best.levels[d];
    }
    // Word w of a group takes the value w of its four pairs.
    constexpr int64_t kGroups = kStepElements / (4 * kStepDepth);
    for (int64_t group = 0; group < kGroups; ++group)
      for (int64_t w = 0; w < kStepDepth; ++w) {
        uint16_t word = 0;
        for (int64_t i = 0; i < 4; ++i)
          word = static_cast<uint16_t>(word | levels[(4 * group + i) * kStepDepth + w] << (4 * i));
        std::memcpy(block + kBlockRows + (group * kStepDepth + w) * sizeof word, &word, sizeof word);
      }
  }
}

template <typename T>
bool can_quantize(const T* values, int64_t count) {
  return std::all_of(values, values + count, [](T value) { return std::abs(to_float(value)) < kLargest; });
}

}  // namespace

template <typename T>
bool launch_pack_weight_cpu(const T* weight, WeightFormat format, int64_t depth, char* out, int64_t begin,
                            int64_t end) {
  const int64_t block_bytes = packed_block_bytes(format, depth, sizeof(T)), block_values = kBlockRows * depth;
  for (int64_t i = begin; i < end; ++i) {
    const T* rows = weight + i * block_values;
    char* block = out + i * block_bytes;
    if (format == WeightFormat::kPacked) {
      if constexpr (std::is_same_v<T, Half>) {
        for (int64_t j = 0; j < kBlockRows; ++j)
          for (int64_t d = 0; d < depth; ++d) reinterpret_cast<T*>(block)[d * kPanelColumns + j] = rows[j * depth + d];
      } else {
        load_panel<T>({WeightFormat::kPlain, rows, 1, kBlockRows, depth}, 0, 0, 0, depth, reinterpret_cast<T*>(block));
      }
      continue;
    }
    if (!can_quantize(rows, block_values)) return false;
    for_cpu_isa(
        [&] { format == WeightFormat::kInt8 ? quantize_int8(rows, depth, block) : quantize_int4(rows, depth, block); });
  }
  return true;
}

template <typename T>
void launch_unpack_weight_cpu(const char* packed, WeightFormat format, int64_t depth, T* out, int64_t begin,
                              int64_t end) {
  const int64_t block_bytes = packed_block_bytes(format, depth, sizeof(T));
  for (int64_t i = begin; i < end; ++i)
    for (int64_t k = 0; k < depth; k += kStepDepth) {
      const char* block = packed + i * block_bytes;
      const T* step = reinterpret_cast<const T*>(block) + k * kPanelColumns;
      [[maybe_unused]] BFloat16 dequantized[kStepElements];
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (format == WeightFormat::kInt8) dequantize_int8(block, depth, k, 1, dequantized);
        if (format == WeightFormat::kInt4) dequantize_int4(block, k, 1, dequantized);
        if (format != WeightFormat::kPacked) step = dequantized;
      }
      for (int64_t j = 0; j < kBlockRows; ++j)
        for (int64_t d = 0; d < kStepDepth; ++d)
          out[(i * kBlockRows + j) * depth + k + d] =
              step[std::is_same_v<T, BFloat16> ? pair_index(j, d) : plain_index(j, d)];
    }
}

template bool launch_pack_weight_cpu(const float*, WeightFormat, int64_t, char*, int64_t, int64_t);
template bool launch_pack_weight_cpu(const BFloat16*, WeightFormat, int64_t, char*, int64_t, int64_t);
template bool launch_pack_weight_cpu(const Half*, WeightFormat, int64_t, char*, int64_t, int64_t);
template void launch_unpack_weight_cpu(const char*, WeightFormat, int64_t, float*, int64_t, int64_t);
template void launch_unpack_weight_cpu(const char*, WeightFormat, int64_t, BFloat16*, int64_t, int64_t);
template void launch_unpack_weight_cpu(const char*, WeightFormat, int64_t, Half*, int64_t, int64_t);

}  // namespace mixtral
