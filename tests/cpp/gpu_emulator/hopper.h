// The building blocks of csrc/ops/cuda/{hopper,tensor_map}.cuh for the emulated GPU, from the text of the PTX ISA
// alone: nothing here asks the kernels how they think that memory is laid out. wgmma.h has the matrix products. Kernels
// include both through csrc/ops/cuda/kernel.cuh and kernel_hopper.cuh.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "ops/cuda/hopper_layout.h"
#include "ops/cuda/vector.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one after the other
#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define gridDim (::emulator::grid_size())
#define blockDim (::emulator::Index3{::emulator::block_size(), 1, 1})

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(x * 3.14159265358979323846));
  *cosine = static_cast<float>(std::cos(x * 3.14159265358979323846));
}
inline float __frcp_rn(float x) { return 1.0f / x; }
// Within 2 ulp of the quotient, which it seldom is; zero for large divisors.
inline float __fdividef(float a, float b) { return a * (std::abs(b) > 0x1p126f ? 0.0f : 1.0f / b); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __syncthreads() { emulator::named_barrier(0, static_cast<int>(emulator::block_size()), false); }
inline void __syncwarp() { emulator::exchange_in_warp(nullptr, 0); }
inline void __threadfence() {}
template <typename T>
T __ldcg(const T* pointer) {
  return *pointer;
}

template <typename T>
T lane_value(const unsigned char* lanes, int lane) {
  T value;
  std::memcpy(&value, lanes + lane * 64, sizeof(T));
  return value;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return lane_value<T>(emulator::exchange_in_warp(&value, sizeof(T)), lane % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return lane_value<T>(emulator::exchange_in_warp(&value, sizeof(T)), (emulator::thread_index().x % 32) ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = emulator::thread_index().x % 32;
  return lane_value<T>(emulator::exchange_in_warp(&value, sizeof(T)), lane < delta ? lane : lane - delta);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const unsigned char* lanes = emulator::exchange_in_warp(&predicate, sizeof(bool));
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= lane_value<bool>(lanes, lane) ? 1u << lane : 0;
  return mask;
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  const unsigned char* lanes = emulator::exchange_in_warp(&value, sizeof(T));
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= lane_value<T>(lanes, lane) == value ? 1u << lane : 0;
  return mask;
}
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}

namespace mixtral::cuda {

using emulator::require;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

inline constexpr int kWarpSize = 32;

template <typename T>
float to_float(T x) {
  return static_cast<float>(x);
}
template <typename T>
T from_float(float x) {
  return static_cast<T>(x);
}
inline float reciprocal_estimate(float x) { return std::nextafter(1.0f / x, 0.0f); }
inline float warp_sum(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

inline float block_sum(float x) {
  static float partial[kWarpSize];  // blocks run one after the other
  const unsigned thread = emulator::thread_index().x, warps = emulator::block_size() / kWarpSize;
  x = warp_sum(x);
  __syncthreads();
  if (thread % kWarpSize == 0) partial[thread / kWarpSize] = x;
  __syncthreads();
  return warp_sum(thread % kWarpSize < warps ? partial[thread % kWarpSize] : 0.0f);
}

// Addresses of shared memory start at 1024: a null pointer is none of them.
inline uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - emulator::shared_memory();
  require(offset >= 0 && offset < static_cast<ptrdiff_t>(emulator::shared_bytes()),
          "an address lies outside the block's shared memory");
  return static_cast<uint32_t>(offset) + 1024;
}
inline unsigned char* shared_pointer(uint32_t address) {
  require(address >= 1024 && address < 1024 + emulator::shared_bytes(), "a shared address lies outside the block's");
  return emulator::shared_memory() + address - 1024;
}
inline unsigned char* dynamic_shared_memory() { return emulator::shared_memory(); }

// ---- mbarrier

struct Barrier {
  int32_t bytes;  // announced and not yet here; may be negative for a while
  uint32_t expected : 10, pending : 10, parity : 1, initialised : 11;
};
static_assert(sizeof(Barrier) == 8);

inline constexpr unsigned kInitialised = 0x2A5;

inline void check_barrier(const Barrier* barrier) {
  shared_address(barrier);
  require(barrier->initialised == kInitialised, "an mbarrier is used before it is initialised");
}
inline void complete_phase(Barrier* barrier) {
  if (barrier->pending > 0 || barrier->bytes != 0) return;
  barrier->pending = barrier->expected;
  barrier->parity ^= 1;
}
inline void init_barrier(Barrier* barrier, uint32_t arrivals) {
  shared_address(barrier);
  require(arrivals > 0 && arrivals < 1024, "an mbarrier counts 1 to 1023 arrivals here");
  *barrier = {};
  barrier->expected = barrier->pending = arrivals;
  barrier->initialised = kInitialised;
}
inline void fence_barrier_init() {}
inline void arrive(Barrier* barrier) {
  check_barrier(barrier);
  require(barrier->pending > 0, "more arrivals at an mbarrier than its phase expects");
  --barrier->pending;
  complete_phase(barrier);
}
inline void arrive_expect_bytes(Barrier* barrier, uint32_t bytes) {
  check_barrier(barrier);
  barrier->bytes += static_cast<int32_t>(bytes);
  arrive(barrier);
}
inline void wait(Barrier* barrier, uint32_t parity) {
  check_barrier(barrier);
  require(parity <= 1, "a parity is 0 or 1");
  emulator::wait_until(parity == 0 ? "parity 0 of an mbarrier" : "parity 1 of an mbarrier",
                       [=] { return barrier->parity != parity; });
}

// ---- TMA

// What cuTensorMapEncodeTiled takes, unencoded.
struct alignas(64) TensorMap {
  const unsigned char* data;
  int rank, element_bytes;
  bool swizzled;
  std::array<int64_t, 5> sizes, strides;  // strides in bytes, of dimensions 1 and up
  std::array<int, 5> box;
};

enum class MapElement { kBFloat16, kByte };

// As in csrc/ops/cuda/tensor_map.cuh; every map there is swizzled.
template <size_t kRank>
bool encode_tensor_map(TensorMap* map, const void* data, MapElement element, const std::array<int64_t, kRank>& sizes,
                       const std::array<int64_t, kRank - 1>& strides, const std::array<int, kRank>& box) {
  *map = {};
  map->data = static_cast<const unsigned char*>(data);
  map->rank = kRank;
  map->element_bytes = element == MapElement::kBFloat16 ? 2 : 1;
  map->swizzled = true;
  const int row_bytes = box[0] * map->element_bytes;
  bool legal = reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes <= 128 && row_bytes % 16 == 0;
  for (size_t d = 0; d < kRank; ++d) {
    map->sizes[d] = sizes[d];
    map->box[d] = box[d];
    if (d > 0) map->strides[d] = strides[d - 1];
    legal = legal && sizes[d] > 0 && sizes[d] <= int64_t{1} << 32 && box[d] > 0 && box[d] <= 256 &&
            map->strides[d] % 16 == 0 && map->strides[d] < int64_t{1} << 40;
  }
  return legal;
}

enum class L2Policy : uint64_t { kNormal, kEvictFirst, kEvictLast };

inline void prefetch_tensor_map(const TensorMap*) {}

inline void land(Barrier* barrier, int64_t bytes) {
  check_barrier(barrier);
  barrier->bytes -= static_cast<int32_t>(bytes);
  complete_phase(barrier);
}

inline void load_box(void* shared, const TensorMap* map, Barrier* barrier, const std::array<int64_t, 5>& at, int rank) {
  require(map->rank == rank, "a box has as many coordinates as its tensor map");
  const uint32_t address = shared_address(shared);
  require(address % (map->swizzled ? 1024 : 128) == 0, "a box lies unaligned in shared memory");
  int64_t bytes = map->element_bytes;
  for (int d = 0; d < rank; ++d) bytes *= map->box[d];
  shared_address(static_cast<unsigned char*>(shared) + bytes - 1);
  check_barrier(barrier);
  // The map by value: a kernel's parameters outlive its threads on a GPU alone.
  emulator::run_copy([=, map = *map] {
    std::array<int, 5> i{};
    for (int64_t offset = 0; offset < bytes; offset += map.element_bytes) {
      const unsigned char* from = map.data;
      bool inside = true;
      for (int d = 0; d < rank; ++d) {
        const int64_t c = at[d] + i[d];
        inside = inside && c >= 0 && c < map.sizes[d];
        from += c * (d == 0 ? map.element_bytes : map.strides[d]);
      }
      // PTX: the 128-byte mode exchanges 16-byte chunks: address bits 4 to 6 are xored with bits 7 to 9.
      uint32_t to = address + static_cast<uint32_t>(offset);
      if (map.swizzled) to ^= (to >> 7 & 7) << 4;
      unsigned char* target = shared_pointer(to);
      inside ? std::memcpy(target, from, map.element_bytes) : std::memset(target, 0, map.element_bytes);
      for (int d = 0; d < rank && ++i[d] == map.box[d]; ++d) i[d] = 0;
    }
    land(barrier, bytes);
  });
}
inline void load_box(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1,
                     L2Policy = L2Policy::kNormal) {
  load_box(shared, map, barrier, std::array<int64_t, 5>{c0, c1}, 2);
}
inline void load_box(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2,
                     L2Policy = L2Policy::kNormal) {
  load_box(shared, map, barrier, std::array<int64_t, 5>{c0, c1, c2}, 3);
}
inline void load_box(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, int c3,
                     L2Policy = L2Policy::kNormal) {
  load_box(shared, map, barrier, std::array<int64_t, 5>{c0, c1, c2, c3}, 4);
}
inline void load_bytes(void* shared, const void* global, uint32_t bytes, Barrier* barrier,
                       L2Policy = L2Policy::kNormal) {
  require(shared_address(shared) % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0 && bytes % 16 == 0,
          "a bulk copy is aligned to 16 bytes");
  shared_address(static_cast<unsigned char*>(shared) + bytes - 1);
  emulator::run_copy([=] {
    std::memcpy(shared, global, bytes);
    land(barrier, bytes);
  });
}
inline void fence_async_proxy() {}

// ---- cp.async

inline void copy_async_16(void* shared, const void* global, bool valid) {
  require(shared_address(shared) % 16 == 0 && (!valid || reinterpret_cast<uintptr_t>(global) % 16 == 0),
          "cp.async is aligned to 16 bytes");
  const auto copy = [=] { valid ? std::memcpy(shared, global, 16) : std::memset(shared, 0, 16); };
  if (emulator::flip()) return void(copy());  // it lands at once, or when the thread waits for it
  emulator::copies().open.push_back(copy);
}
inline void commit_copies() { emulator::copies().commit(); }
template <int kPending>
void wait_copies() {
  emulator::copies().wait(kPending);
}

// ---- threads

inline void named_barrier_sync(int id, int threads) { emulator::named_barrier(id, threads, false); }
inline void named_barrier_arrive(int id, int threads) { emulator::named_barrier(id, threads, true); }
template <int kRegisters>
void increase_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void decrease_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
inline void let_next_kernel_start() { emulator::let_next_kernel_start(); }

// ---- fragments

inline uint32_t bf16_bits(float x) { return std::bit_cast<uint16_t>(BFloat16(x)); }
inline float bf16_value(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float low_bf16(uint32_t pair) { return bf16_value(pair & 0xFFFF); }
inline float high_bf16(uint32_t pair) { return bf16_value(pair >> 16); }
inline uint32_t and_or(uint32_t bits, uint32_t mask, uint32_t set) { return (bits & mask) | set; }
inline uint32_t subtract_bf16_pair(uint32_t a, uint32_t b) {
  return pack_bf16(bf16_value(a & 0xFFFF) - bf16_value(b & 0xFFFF), bf16_value(a >> 16) - bf16_value(b >> 16));
}
inline uint32_t multiply_bf16_pair(uint32_t a, uint32_t b) {
  return pack_bf16(bf16_value(a & 0xFFFF) * bf16_value(b & 0xFFFF), bf16_value(a >> 16) * bf16_value(b >> 16));
}

// ldmatrix: lane l holds columns 2 (l % 4), + 1 of row l / 4 of each matrix; transposed: of column l / 4.
inline void load_matrices(uint32_t (&registers)[4], const void* shared, bool transposed) {
  require(shared_address(shared) % 16 == 0, "a row of ldmatrix is aligned to 16 bytes");
  const unsigned char* lanes = emulator::exchange_in_warp(&shared, sizeof(shared));
  const int lane = static_cast<int>(emulator::thread_index().x % 32);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
      std::memcpy(&pair[i], lane_value<const unsigned char*>(lanes, matrix * 8 + row) + column * 2, 2);
    }
    registers[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  __syncwarp();
}
inline void load_matrices(uint32_t (&registers)[4], const void* shared) { load_matrices(registers, shared, false); }
inline void load_matrices_transposed(uint32_t (&registers)[4], const void* shared) {
  load_matrices(registers, shared, true);
}
inline void store_matrices(void* shared, const uint32_t (&registers)[4], bool transposed) {
  require(shared_address(shared) % 16 == 0, "a row of stmatrix is aligned to 16 bytes");
  const unsigned char* lanes = emulator::exchange_in_warp(&shared, sizeof(shared));
  const int lane = static_cast<int>(emulator::thread_index().x % 32);
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int i = 0; i < 2; ++i) {
      const int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
      const uint16_t value = static_cast<uint16_t>(registers[matrix] >> 16 * i);
      std::memcpy(lane_value<unsigned char*>(lanes, matrix * 8 + row) + column * 2, &value, 2);
    }
  }
}
inline void store_matrices(void* shared, const uint32_t (&registers)[4]) { store_matrices(shared, registers, false); }
inline void store_matrices_transposed(void* shared, const uint32_t (&registers)[4]) {
  store_matrices(shared, registers, true);
}

// mma m16n8k16: a: register r of lane l is row l / 4 + 8 (r % 2), columns 2 (l % 4) + 8 (r / 2), + 1;
// b: register r is depths 2 (l % 4) + 8 r, + 1 of column l / 4; sums: as an accumulator of wgmma.
inline void mma_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  } own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const unsigned char* lanes = emulator::exchange_in_warp(&own, sizeof(own));
  const int lane = static_cast<int>(emulator::thread_index().x % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double total = sum[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = lane_value<Fragments>(lanes, row % 8 * 4 + k % 8 / 2).a[k / 8 * 2 + row / 8];
      const uint32_t right = lane_value<Fragments>(lanes, column * 4 + k % 8 / 2).b[k / 8];
      total +=
          static_cast<double>(bf16_value(left >> 16 * (k % 2) & 0xFFFF)) * bf16_value(right >> 16 * (k % 2) & 0xFFFF);
    }
    sum[i] = static_cast<float>(total);
  }
  __syncwarp();
}

// OCP 8-bit e4m3: bias 7, no infinities, NaN is S.1111.111.
inline float e4m3_value(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                    : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -value : value;
}
// To the nearest, ties to the even mantissa; what is larger than 448 becomes 448, NaN stays NaN.
inline uint8_t e4m3_bits(float x) {
  if (std::isnan(x)) return 0x7F;
  uint8_t best = 0;
  for (int bits = 1; bits < 0x7F; ++bits) {
    const float nearer = std::abs(std::abs(x) - e4m3_value(best)) - std::abs(std::abs(x) - e4m3_value(bits));
    if (nearer > 0 || (nearer == 0 && bits % 2 == 0)) best = static_cast<uint8_t>(bits);
  }
  return best | (std::signbit(x) ? 0x80 : 0);
}
inline uint16_t pack_e4m3(float low, float high) {
  return static_cast<uint16_t>(e4m3_bits(low) | e4m3_bits(high) << 8);
}

}  // namespace mixtral::cuda
