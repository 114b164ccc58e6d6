// The matrix products of csrc/ops/cuda/wgmma.cuh for the emulated GPU, from the text of the PTX ISA alone.
#pragma once

#include <functional>

#include "hopper.h"

namespace mixtral::cuda {

// A matrix descriptor, taken apart again.
struct Matrix {
  uint32_t address, leading, stride;
  explicit Matrix(uint64_t descriptor)
      : address(static_cast<uint32_t>(descriptor & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4) {
    require(descriptor >> 62 == 1, "a matrix descriptor here has the 128-byte swizzle");
    require((descriptor >> 49 & 7) == 0, "a matrix descriptor here has base offset 0");
  }
  static const unsigned char* at(uint32_t linear) { return shared_pointer(linear ^ (linear >> 7 & 7) << 4); }
  // K-major: rows of 128 bytes, groups of 8 rows `stride` apart.
  const unsigned char* row(int row, int byte) const { return at(address + row / 8 * stride + row % 8 * 128 + byte); }
  // MN-major, 16-bit: depths are rows of 64 values, groups of 8 `stride` apart; chunks of 64 rows `leading` apart.
  const unsigned char* column(int row, int depth) const {
    return at(address + row / 64 * leading + depth / 8 * stride + depth % 8 * 128 + row % 64 * 2);
  }
};

inline float bf16_at(const unsigned char* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return bf16_value(bits);
}

inline void fence_accumulators() { emulator::exchange_in_warp(nullptr, 0); }
template <int kValues>
void keep_order(float (&)[kValues]) {}
inline void commit_products() { emulator::products().commit(); }
template <int kPending>
void wait_products() {
  emulator::products().wait(kPending);
}

template <int kPending, int kSums>
void wait_products(float (&)[kSums]) {
  wait_products<kPending>();
}

// At once, or when the thread waits for it: both are allowed to happen on a GPU.
inline void issue(std::function<void()> work) {
  auto& groups = emulator::products();
  if (groups.open.empty() && groups.committed.empty() && emulator::flip()) return work();
  groups.open.push_back(std::move(work));
}

// sums += a [2 rows of this thread, kDepth] * b(column, depth)
template <int N, int kDepth, typename A, typename B>
void multiply_fragment(float (&sums)[N / 2], const A& a, const B& b, bool accumulate) {
  const int thread = static_cast<int>(emulator::thread_index().x % 128), lane = thread % 32;
  float rows[2][kDepth];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < kDepth; ++k) rows[half][k] = a(thread / 32 * 16 + lane / 4 + half * 8, k);
  }
  for (int column = lane % 4 * 2; column < N; column += column % 2 == 0 ? 1 : 7) {
    float values[kDepth];
    for (int k = 0; k < kDepth; ++k) values[k] = b(column, k);
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[column / 8 * 4 + half * 2 + column % 2];
      double total = accumulate ? sum : 0.0;
      for (int k = 0; k < kDepth; ++k) total += static_cast<double>(rows[half][k]) * values[k];
      sum = static_cast<float>(total);
    }
  }
}

template <int N>
void multiply_bf16(float (&sums)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  const Matrix left(a), right(b);
  issue([=, &sums] {
    multiply_fragment<N, 16>(
        sums, [&](int row, int k) { return bf16_at(left.row(row, k * 2)); },
        [&](int column, int k) { return bf16_at(right.row(column, k * 2)); }, accumulate);
  });
}

template <int N, bool kTransposed>
void multiply_bf16(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  const Matrix right(b);
  const unsigned char* lanes = emulator::exchange_in_warp(&a, sizeof(a));
  std::array<std::array<uint32_t, 4>, 32> words;
  for (int lane = 0; lane < 32; ++lane) words[lane] = lane_value<std::array<uint32_t, 4>>(lanes, lane);
  const std::array<uint32_t, 4>& own = words[emulator::thread_index().x % 32];
  issue([=, &sums, &a] {
    require(std::equal(own.begin(), own.end(), a), "an operand of a wgmma product in flight was overwritten");
    multiply_fragment<N, 16>(
        sums,
        [&](int row, int k) {
          return bf16_value(words[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row % 16 / 8] >> 16 * (k % 2) & 0xFFFF);
        },
        [&](int column, int k) { return bf16_at(kTransposed ? right.column(column, k) : right.row(column, k * 2)); },
        accumulate);
  });
}

template <int N>
void multiply_e4m3(float (&sums)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  const Matrix left(a), right(b);
  issue([=, &sums] {
    multiply_fragment<N, 32>(
        sums, [&](int row, int k) { return e4m3_value(*left.row(row, k)); },
        [&](int column, int k) { return e4m3_value(*right.row(column, k)); }, accumulate);
  });
}

}  // namespace mixtral::cuda
