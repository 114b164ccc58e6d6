#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "dequantize.h"
#include "pack_weight.h"

namespace mixtral {

using namespace cpu;

namespace {

// Where the value of row j at depth d lies in a step: in pair order, or depth by depth.
int64_t pair_index(int64_t j, int64_t d) { return (j / 16 * 16 + d / 2) * 32 + j % 16 * 2 + d % 2; }
int64_t plain_index(int64_t j, int64_t d) { return d * kPanelColumns + j; }

// Where nibble and byte of row j at depth d lie in a step of int4 (pack_weight.h).
struct NibbleIndex {
  int64_t byte;
  int shift;
};
NibbleIndex nibble_index(int64_t j, int64_t d) {
  const int64_t half = j / 16, pair = d / 2, word = j % 8 * 2 + d % 2, nibble = pair % 4 * 2 + j % 16 / 8;
  const int64_t first = kBlockRows * static_cast<int64_t>(sizeof(Half)) + half * 256 + pair / 4 * 64 + word * 4;
  return {first + nibble / 2, static_cast<int>(nibble % 2 * 4)};
}

// The value of largest magnitude, with its sign; 0 when all are.
template <typename T>
float extreme(const T* values, int64_t count) {
  float result = 0;
  for (int64_t i = 0; i < count; ++i)
    if (std::abs(to_float(values[i])) > std::abs(result)) result = to_float(values[i]);
  return result;
}

int nearest(float value, float scale, float limit_low, float limit_high) {
  return scale == 0 ? 0 : static_cast<int>(std::clamp(std::nearbyint(value / scale), limit_low, limit_high));
}

// rows [32, depth]
template <typename T>
void quantize_int8(const T* rows, int64_t depth, char* block) {
  float scales[kBlockRows];
  for (int64_t j = 0; j < kBlockRows; ++j) {
    const float scale = scales[j] = std::abs(extreme(rows + j * depth, depth)) / 127;
    for (int64_t d = 0; d < depth; ++d)
      block[d / kStepDepth * kStepElements + pair_index(j, d % kStepDepth)] =
          static_cast<char>(nearest(to_float(rows[j * depth + d]), scale, -127, 127));
  }
  std::memcpy(block + kBlockRows * depth, scales, sizeof scales);
}

// The extreme value of 32 becomes -8: the side with one step more is the longer one. False where a scale overflows.
template <typename T>
bool quantize_int4(const T* rows, int64_t depth, char* block) {
  std::memset(block, 0, depth / kStepDepth * kInt4StepBytes);
  for (int64_t k = 0; k < depth; k += kStepDepth, block += kInt4StepBytes) {
    Half scales[kBlockRows];
    for (int64_t j = 0; j < kBlockRows; ++j) {
      const T* values = rows + j * depth + k;
      scales[j] = from_float<Half>(extreme(values, kStepDepth) / -8);
      if (!std::isfinite(to_float(scales[j]))) return false;
      for (int64_t d = 0; d < kStepDepth; ++d) {
        const int q = nearest(to_float(values[d]), to_float(scales[j]), -8, 7) + 8;
        const NibbleIndex at = nibble_index(j, d);
        block[at.byte] = static_cast<char>(block[at.byte] | q << at.shift);
      }
    }
    std::memcpy(block, scales, sizeof scales);
  }
  return true;
}

template <typename T>
bool all_finite(const T* values, int64_t count) {
  return std::all_of(values, values + count, [](T value) { return std::isfinite(to_float(value)); });
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
    if (!all_finite(rows, block_values)) return false;
    if (format == WeightFormat::kInt8) quantize_int8(rows, depth, block);
    if (format == WeightFormat::kInt4 && !quantize_int4(rows, depth, block)) return false;
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
