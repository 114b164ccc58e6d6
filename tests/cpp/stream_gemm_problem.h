// Problems for the kernel of the grouped GEMM of few rows on the emulated GPU, and their operands in every format.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "gpu_emulator/wgmma.h"
#include "ops/grouped_gemm/hopper/grouped_gemm_stream_hopper.cuh"

namespace mixtral::cuda {

struct Problem {
  std::vector<int64_t> offs;  // empty: a dense layer
  int64_t rows, columns, depth;
  bool swiglu = false;
  int64_t experts = std::max<int64_t>(1, static_cast<int64_t>(offs.size()));
  int64_t weight_rows = columns * (swiglu ? 2 : 1);
  std::vector<BFloat16> a = std::vector<BFloat16>(rows * depth);                   // [rows, depth]
  std::vector<BFloat16> b = std::vector<BFloat16>(experts * weight_rows * depth);  // [experts, weight_rows, depth]

  int64_t expert_of(int64_t row) const {
    if (offs.empty()) return 0;
    int64_t end = 0;
    for (int64_t e = 0; e < experts; ++e) {
      end = std::min(std::max(offs[e], end), rows);
      if (row < end) return e;
    }
    return experts;
  }

  float product(int64_t row, int64_t expert, int64_t weight_row) const {
    float sum = 0;
    for (int64_t k = 0; k < depth; ++k) {
      sum += static_cast<float>(a[row * depth + k]) *
             static_cast<float>(b[(expert * weight_rows + weight_row) * depth + k]);
    }
    return sum;
  }

  // What an expert makes of a row -> out [columns]
  void compute_row(int64_t row, int64_t expert, float* out) const {
    for (int64_t c = 0; c < columns; ++c) {
      float value = product(row, expert, c);
      if (swiglu) value = swiglu_value(BFloat16(value), BFloat16(product(row, expert, columns + c)));
      out[c] = BFloat16(value);
    }
  }

  std::vector<float> expected() const {  // [rows, columns]
    std::vector<float> out(rows * columns);
    for (int64_t row = 0; row < rows; ++row) {
      if (const int64_t expert = expert_of(row); expert < experts) compute_row(row, expert, &out[row * columns]);
    }
    return out;
  }
};

inline TensorMap weight_map(const Problem& p, const void* b, int unit_rows, WeightFormat format) {
  const StreamGemm gemm{nullptr, {}, p.experts, p.rows, p.columns, p.depth};
  const StreamWeightBoxes boxes = stream_weight_boxes(gemm, p.swiglu, unit_rows, format);
  const MapElement element = format == WeightFormat::kFp8 ? MapElement::kByte : MapElement::kBFloat16;
  TensorMap map;
  EXPECT_TRUE(encode_tensor_map<4>(&map, b, element, boxes.sizes, boxes.strides, boxes.box));
  return map;
}

inline TokenMaps token_maps(const Problem& p, const void* a, int bytes) {
  TokenMaps maps;
  for (int box = 0; box < kTokenBoxes; ++box)
    EXPECT_TRUE(encode_tensor_map<2>(&maps.boxes[box], a, bytes == 2 ? MapElement::kBFloat16 : MapElement::kByte,
                                     {p.depth, p.rows}, {p.depth * bytes}, {128 / bytes, 8 << box}));
  return maps;
}

// The operands in the formats of the kernel. Their constructors give the problem its numbers: few and short enough that
// sums are exact in any order, and not so short that sums need no rounding to bf16.
template <typename Weights>
struct Operands;

inline void fill_tokens(Problem& p) {
  std::mt19937 random(static_cast<unsigned>(p.rows));
  for (auto& x : p.a) x = random() % 3 ? 0.0f : static_cast<float>(static_cast<int>(random() % 5) - 2);
}

template <>
struct Operands<BFloat16Weights> {
  explicit Operands(Problem& p) {
    fill_tokens(p);
    std::mt19937 random(static_cast<unsigned>(p.columns));
    for (auto& x : p.b) x = static_cast<float>(static_cast<int>(random() % 255) - 127) / 64;
  }
  TensorMap weights(const Problem& p, int unit_rows) const {
    return weight_map(p, p.b.data(), unit_rows, WeightFormat::kPlain);
  }
  TokenMaps tokens(const Problem& p) const { return token_maps(p, p.a.data(), 2); }
};

inline float int4_weight(int nibble, uint8_t scale) {  // as pack_weight.h defines it
  const float level = (static_cast<float>(nibble) - 7.5f) * (scale % 2 ? 1.41421356f : 1.0f);
  return std::ldexp(static_cast<float>(BFloat16(level)), scale / 2 - 64);
}

// Bytes behind which no memory is: whoever reads further crashes.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t size) : size_(size) {
    const size_t page = sysconf(_SC_PAGESIZE);
    pages_ = (size + page - 1) / page * page;
    base_ =
        static_cast<uint8_t*>(mmap(nullptr, pages_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + pages_, page, PROT_NONE);
  }
  GuardedBytes(const GuardedBytes&) = delete;
  ~GuardedBytes() { munmap(base_, pages_ + sysconf(_SC_PAGESIZE)); }
  size_t size() const { return size_; }
  uint8_t* data() const { return base_ + pages_ - size_; }

 private:
  size_t size_, pages_;
  uint8_t* base_;
};

template <>
struct Operands<Int4Weights> {
  // Random bytes, and the weights that they are by the words of pack_weight.h.
  explicit Operands(Problem& p) : packed(p.experts * p.weight_rows / 32 * (p.depth / 32) * kInt4StepBytes) {
    fill_tokens(p);
    std::mt19937 random(static_cast<unsigned>(p.columns));
    for (size_t i = 0; i < packed.size(); ++i)
      packed.data()[i] = static_cast<uint8_t>(i % kInt4StepBytes < 32 ? 126 + random() % 6 : random());
    const int64_t steps = p.depth / 32;
    for (int64_t block = 0; block < p.experts * p.weight_rows / 32; ++block)
      for (int64_t step = 0; step < steps; ++step)
        unpack_step(packed.data() + (block * steps + step) * kInt4StepBytes, p,
                    p.b.data() + block * 32 * p.depth + step * 32);
  }
  // out: the first row, at the step's first depth
  static void unpack_step(const uint8_t* bytes, const Problem& p, BFloat16* out) {
    const uint8_t* word = bytes + 32;
    for (int half = 0; half < 2; ++half)
      for (int group = 0; group < 4; ++group)
        for (int w = 0; w < 32; ++w, word += 2)
          for (int i = 0; i < 4; ++i) {
            const int row = 16 * half + w / 2, depth = 2 * (4 * group + i) + w % 2;
            out[row * p.depth + depth] = int4_weight((word[0] | word[1] << 8) >> 4 * i & 15, bytes[row]);
          }
  }
  Int4Weights::Source weights(const Problem&, int) const { return {reinterpret_cast<const char*>(packed.data())}; }
  TokenMaps tokens(const Problem& p) const { return token_maps(p, p.a.data(), 2); }

  GuardedBytes packed;
};

template <>
struct Operands<E4m3Weights> {
  // Random numbers, 1/2 to 7.5 of both signs, and a power of two for each row.
  explicit Operands(Problem& p)
      : a(p.a.size()), packed(p.experts * p.weight_rows / 32 * (32 * p.depth + 128)), random(p.columns) {
    for (int64_t row = 0; row < p.rows; ++row) {
      a_scales.push_back(random_scale());
      fill_row(a.data() + row * p.depth, a_scales.back(), p.a.data() + row * p.depth, p.depth);
    }
    for (int64_t row = 0; row < p.experts * p.weight_rows; ++row) {
      uint8_t* block = packed.data() + row / 32 * (32 * p.depth + 128);
      const float scale = random_scale();
      std::memcpy(block + 32 * p.depth + row % 32 * 4, &scale, 4);
      fill_row(block + row % 32 * p.depth, scale, p.b.data() + row * p.depth, p.depth);
    }
  }
  float random_scale() { return std::ldexp(1.0f, static_cast<int>(random() % 5) - 2); }
  void fill_row(uint8_t* bytes, float scale, BFloat16* values, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      bytes[k] = static_cast<uint8_t>(0x30 + random() % 0x20 + random() % 2 * 0x80);
      values[k] = e4m3_value(bytes[k]) * scale;
    }
  }
  E4m3Weights::Source weights(const Problem& p, int unit_rows) const {
    return {weight_map(p, packed.data(), unit_rows, WeightFormat::kFp8), reinterpret_cast<const char*>(packed.data()),
            a_scales.data()};
  }
  TokenMaps tokens(const Problem& p) const { return token_maps(p, a.data(), 1); }

  std::vector<uint8_t> a;
  std::vector<float> a_scales;
  GuardedBytes packed;
  std::mt19937 random;
};

}  // namespace mixtral::cuda
