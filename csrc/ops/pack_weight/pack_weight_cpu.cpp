#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "../cpu/transpose.h"
#include "pack_weight.h"
#include "packed_value.h"
#include "weight_kernels.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr float kSqrt2 = 1.41421356f;
constexpr float kLargest = 0x1p66f;        // the largest scale of int4 covers it
constexpr double kClearlyLess = 0.999999;  // so that rounding errors do not decide

// 32 depths of 32 rows, which lie side by side as the lanes of vectors do.
using Tile = float[kStepDepth][kBlockRows];

// Depths [k, k + 32) of rows [32, depth].
template <typename T>
MIXTRAL_INLINE void load_tile(const T* rows, int64_t depth, int64_t k, Tile& tile) {
  if constexpr (std::is_same_v<T, BFloat16>) {  // pairs of depths are transposed as words: half the work
    for (int64_t first = 0; first < kBlockRows; first += kLanes) {
      const void* sixteen[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) sixteen[j] = rows + (first + j) * depth + k;
      uint32_t pairs[kStepDepth / 2][kLanes];
      transpose_words(sixteen, pairs, kLanes);
      for (int64_t d = 0; d < kStepDepth; d += 2) {
        float *even = &tile[d][first], *odd = &tile[d + 1][first];
        for (int64_t j = 0; j < kLanes; ++j) even[j] = bits_to_float(pairs[d / 2][j] << 16);
        for (int64_t j = 0; j < kLanes; ++j) odd[j] = bits_to_float(pairs[d / 2][j] & 0xffff0000u);
      }
    }
    return;
  }
  float values[kBlockRows][kStepDepth];
  for (int64_t j = 0; j < kBlockRows; ++j)
    for (int64_t d = 0; d < kStepDepth; ++d) values[j][d] = to_float(rows[j * depth + k + d]);
  for (int64_t first = 0; first < kBlockRows; first += kLanes)
    for (int64_t d = 0; d < kStepDepth; d += kLanes) {
      const void* sixteen[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) sixteen[j] = &values[first + j][d];
      transpose_words(sixteen, &tile[d][first], kBlockRows);
    }
}

// The largest magnitude of `count` values, a multiple of 32. Magnitudes are compared as bits, which the compiler may
// reorder, unlike floats; inf and NaN are larger than all others.
template <typename T>
MIXTRAL_INLINE float largest_magnitude(const T* values, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max() / 2;
  Bits largest[2 * kStepDepth / sizeof(T)] = {};
  constexpr int64_t kAtOnce = sizeof largest / sizeof(T);
  for (int64_t i = 0; i < count; i += kAtOnce)
    for (int64_t d = 0; d < kAtOnce; ++d) {
      Bits bits;
      std::memcpy(&bits, values + i + d, sizeof bits);
      bits &= kMagnitude;
      largest[d] = bits > largest[d] ? bits : largest[d];
    }
  T value;
  std::memcpy(&value, std::max_element(largest, largest + kAtOnce), sizeof value);
  return to_float(value);
}

// rows [32, depth] with the largest magnitudes `largest` [32]
template <typename T>
MIXTRAL_INLINE void quantize_int8(const T* rows, const float* largest, int64_t depth, char* block) {
  float scales[kBlockRows];
  // Not subnormal: instructions on bf16 treat subnormals as zero.
  for (int64_t j = 0; j < kBlockRows; ++j) scales[j] = std::max(largest[j] / 127, std::numeric_limits<float>::min());
  std::memcpy(block + kBlockRows * depth, scales, sizeof scales);
  for (int64_t k = 0; k < depth; k += kStepDepth) {
    Tile tile;
    load_tile(rows, depth, k, tile);
    const auto level = [&](int64_t d, int64_t j) __attribute__((always_inline)) {
      return static_cast<uint32_t>(static_cast<int32_t>(std::nearbyint(tile[d][j] / scales[j])));
    };
    for (int64_t d = 0; d < kStepDepth; d += 2)
      for (int64_t first = 0; first < kBlockRows; first += kLanes) {
        uint16_t pairs[kLanes];
        for (int64_t j = 0; j < kLanes; ++j)
          pairs[j] = static_cast<uint16_t>((level(d, first + j) & 0xff) | level(d + 1, first + j) << 8);
        std::memcpy(block + k * kBlockRows + pair_index(first, d), pairs, sizeof pairs);
      }
  }
}

// rows [32, depth] with the largest magnitudes `largest` [32]
template <typename T>
MIXTRAL_INLINE void quantize_fp8(const T* rows, const float* largest, int64_t depth, char* block) {
  for (int64_t j = 0; j < kBlockRows; ++j, rows += depth) {
    const float scale = bits_to_float(e4m3_scale_bits(float_to_bits(largest[j])));
    const float inverse = 1 / scale;
    std::memcpy(block + kBlockRows * depth + j * sizeof scale, &scale, sizeof scale);
    auto* values = reinterpret_cast<uint8_t*>(block) + j * depth;
    for (int64_t d = 0; d < depth; ++d) values[d] = to_e4m3(to_float(rows[d]) * inverse);
  }
}

// ---- int4: the scales and levels of sixteen rows of a tile, from row `first` on

// The scale of a scale byte: its exponent is added to the bits of 1 or of the square root of two.
MIXTRAL_INLINE float int4_scale(int32_t scale) {
  const uint32_t factor = float_to_bits((scale & 1) != 0 ? kSqrt2 : 1.0f);
  return bits_to_float(factor + (static_cast<uint32_t>((scale >> 1) - 64) << 23));
}

// Between 0 and 15. As integers, the bits of floats have the order of the floats, and negative ones are below zero:
// compilers make vector instructions of these comparisons, but not of those of floats, for which NaN is no number.
MIXTRAL_INLINE float clamp_level(float level) {
  const int32_t most = static_cast<int32_t>(float_to_bits(15.0f)), bits = static_cast<int32_t>(float_to_bits(level));
  return bits_to_float(static_cast<uint32_t>(std::min(std::max(bits, 0), most)));
}

// q + 8 of the level nearest to `value`
MIXTRAL_INLINE float nearest_level(float value, float inverse_scale) {
  return clamp_level(std::floor(value * inverse_scale) + 8);
}

// The smallest scales whose outermost levels reach the largest of their 32 values.
MIXTRAL_INLINE void covering_scales(const Tile& tile, int64_t first, int32_t* scales) {
  const int32_t half_sqrt2 = static_cast<int32_t>(float_to_bits(kSqrt2) & 0x7fffffu);
  uint32_t largest[kLanes] = {};  // magnitudes, as bits
  for (int64_t d = 0; d < kStepDepth; ++d)
    for (int64_t j = 0; j < kLanes; ++j)
      largest[j] = std::max(largest[j], float_to_bits(tile[d][first + j]) & 0x7fffffffu);
  for (int64_t j = 0; j < kLanes; ++j) {
    const auto bits = static_cast<int32_t>(float_to_bits(bits_to_float(largest[j]) / 7.5f));
    // largest / 7.5 = fraction * 2^exponent with a fraction in [1/2, 1)
    const int32_t exponent = (bits >> 23) - 126, fraction = bits & 0x7fffff;
    scales[j] = std::min(std::max(2 * (exponent + 64) - (fraction <= half_sqrt2 ? 1 : 0), 0), 255);
  }
}

// Squared errors of 32 values each at one scale.
MIXTRAL_INLINE void squared_errors(const Tile& tile, int64_t first, const int32_t* scales, double* errors) {
  float s[kLanes], inverse[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) s[j] = int4_scale(scales[j]);
  for (int64_t j = 0; j < kLanes; ++j) inverse[j] = 1 / s[j];
  for (int64_t j = 0; j < kLanes; ++j) errors[j] = 0;
  for (int64_t d = 0; d < kStepDepth; ++d)
    for (int64_t j = 0; j < kLanes; ++j) {
      const float value = tile[d][first + j];
      const float error = __builtin_fmaf(7.5f - nearest_level(value, inverse[j]), s[j], value);
      errors[j] += static_cast<double>(error) * static_cast<double>(error);
    }
}

// A smaller scale clips the largest of the 32 values and is finer for the others. Of three scales the best is chosen.
MIXTRAL_INLINE void best_scales(const Tile& tile, int64_t first, const int32_t* covering, int32_t* best) {
  int32_t smaller[kLanes];
  double least[kLanes], errors[kLanes];
  squared_errors(tile, first, covering, least);
  for (int64_t j = 0; j < kLanes; ++j) best[j] = covering[j];
  for (int32_t less = 1; less <= 2; ++less) {
    for (int64_t j = 0; j < kLanes; ++j) smaller[j] = std::max(0, covering[j] - less);
    squared_errors(tile, first, smaller, errors);
    for (int64_t j = 0; j < kLanes; ++j) {
      const bool better = errors[j] < kClearlyLess * least[j];
      best[j] = better ? smaller[j] : best[j];
      least[j] = better ? errors[j] : least[j];
    }
  }
}

// The same in half the time, by sums in f32. Returns false when some are too close to tell. In units of the scale a
// value is off by at most 2e-6, and a sum E of 32 squares by less than 2e-5 (1 + E).
MIXTRAL_INLINE bool clearly_best_scales(const Tile& tile, int64_t first, const int32_t* covering, int32_t* best) {
  constexpr int kChoices = 3;
  float scales[kChoices][kLanes], inverse[kChoices][kLanes], errors[kChoices][kLanes] = {};
  for (int32_t c = 0; c < kChoices; ++c)
    for (int64_t j = 0; j < kLanes; ++j) scales[c][j] = int4_scale(std::max(0, covering[j] - c));
  for (int32_t c = 0; c < kChoices; ++c)
    for (int64_t j = 0; j < kLanes; ++j) inverse[c][j] = 1 / scales[c][j];
  for (int64_t d = 0; d < kStepDepth; ++d)
    for (int32_t c = 0; c < kChoices; ++c)
      for (int64_t j = 0; j < kLanes; ++j) {
        const float value = __builtin_fmaf(tile[d][first + j], inverse[c][j], 7.5f);
        const float level = std::nearbyint(value);
        const float error = value - (c == 0 ? level : clamp_level(level));  // the covering scale clips nothing
        errors[c][j] = __builtin_fmaf(error, error, errors[c][j]);
      }
  uint32_t close[kLanes] = {};
  for (int64_t j = 0; j < kLanes; ++j) {
    float least = errors[0][j], slack = 2e-5f * (1 + least);
    int32_t choice = 0;
    for (int32_t c = 1; c < kChoices; ++c) {
      const float ratio = scales[c][j] * inverse[0][j], unit = ratio * ratio;
      const float error = unit * errors[c][j], both = slack + 2e-5f * (unit + error);
      const bool better = error + both<least, worse = error> least + both;
      close[j] |= better || worse ? 0u : 1u;
      choice = better ? c : choice;
      slack = better ? both - slack : slack;
      least = better ? error : least;
    }
    best[j] = std::max(0, covering[j] - choice);
  }
  return std::count(close, close + kLanes, 0u) == kLanes;
}

// One half of a step: four groups of 16 pairs of 16-bit words, a pair being a row, its even depths in the low word.
MIXTRAL_INLINE void store_levels(const Tile& tile, int64_t first, const int32_t* scales, char* half) {
  float inverse[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) inverse[j] = 1 / int4_scale(scales[j]);
  for (int64_t group = 0; group < 4; ++group) {
    uint32_t words[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      words[j] = 0;
      for (int64_t i = 0; i < 8; ++i) {
        const float level = nearest_level(tile[8 * group + i][first + j], inverse[j]);
        words[j] |= static_cast<uint32_t>(static_cast<int32_t>(level)) << (i / 2 * 4 + i % 2 * 16);
      }
    }
    std::memcpy(half + group * static_cast<int64_t>(sizeof words), words, sizeof words);
  }
}

// rows [32, depth], scales [32, depth/32], or null to choose the best ones
template <typename T>
MIXTRAL_INLINE void quantize_int4(const T* rows, const uint8_t* scales, int64_t depth, char* block) {
  for (int64_t k = 0; k < depth; k += kStepDepth, block += kInt4StepBytes) {
    Tile tile;
    load_tile(rows, depth, k, tile);
    for (int64_t first = 0; first < kBlockRows; first += kLanes) {
      int32_t chosen[kLanes];
      if (scales) {
        for (int64_t j = 0; j < kLanes; ++j) chosen[j] = scales[((first + j) * depth + k) / kScaleGroup];
      } else {
        int32_t covering[kLanes];
        covering_scales(tile, first, covering);
        if (!clearly_best_scales(tile, first, covering, chosen)) best_scales(tile, first, covering, chosen);
      }
      for (int64_t j = 0; j < kLanes; ++j) block[first + j] = static_cast<char>(chosen[j]);
      store_levels(tile, first, chosen, block + kBlockRows + first / kLanes * 256);
    }
  }
}

// rows [32, depth]. Returns false if a value is 2^66 or more, inf or NaN.
template <typename T>
MIXTRAL_INLINE bool quantize(const T* rows, const uint8_t* scales, WeightFormat format, int64_t depth, char* block) {
  float largest[kBlockRows];
  for (int64_t j = 0; j < kBlockRows; ++j) largest[j] = largest_magnitude(rows + j * depth, depth);
  for (const float magnitude : largest)
    if (!(magnitude < kLargest)) return false;
  if (format == WeightFormat::kInt8) quantize_int8(rows, largest, depth, block);
  if (format == WeightFormat::kFp8) quantize_fp8(rows, largest, depth, block);
  if (format == WeightFormat::kInt4) quantize_int4(rows, scales, depth, block);
  return true;
}

}  // namespace

template <typename T>
bool launch_pack_weight_cpu(const T* weight, const uint8_t* scales, WeightFormat format, int64_t depth, char* out,
                            int64_t begin, int64_t end) {
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
    const uint8_t* block_scales = scales ? scales + i * block_values / kScaleGroup : nullptr;
    bool finite = false;
    for_cpu_isa([&] { finite = quantize(rows, block_scales, format, depth, block); });
    if (!finite) return false;
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
        if (format == WeightFormat::kInt8)
          for (int64_t j = 0; j < kBlockRows; ++j)
            for (int64_t d = 0; d < kStepDepth; ++d) dequantized[pair_index(j, d)] = int8_value(block, depth, j, k + d);
        if (format == WeightFormat::kFp8 || format == WeightFormat::kInt4)
          weight_kernels(format).bf16_panel(block, depth, k / kStepDepth, 1, dequantized);
        if (format != WeightFormat::kPacked) step = dequantized;
      }
      for (int64_t j = 0; j < kBlockRows; ++j)
        for (int64_t d = 0; d < kStepDepth; ++d)
          out[(i * kBlockRows + j) * depth + k + d] =
              step[std::is_same_v<T, BFloat16> ? pair_index(j, d) : plain_index(j, d)];
    }
}

template bool launch_pack_weight_cpu(const float*, const uint8_t*, WeightFormat, int64_t, char*, int64_t, int64_t);
template bool launch_pack_weight_cpu(const BFloat16*, const uint8_t*, WeightFormat, int64_t, char*, int64_t, int64_t);
template bool launch_pack_weight_cpu(const Half*, const uint8_t*, WeightFormat, int64_t, char*, int64_t, int64_t);
template void launch_unpack_weight_cpu(const char*, WeightFormat, int64_t, float*, int64_t, int64_t);
template void launch_unpack_weight_cpu(const char*, WeightFormat, int64_t, BFloat16*, int64_t, int64_t);
template void launch_unpack_weight_cpu(const char*, WeightFormat, int64_t, Half*, int64_t, int64_t);

}  // namespace mixtral
