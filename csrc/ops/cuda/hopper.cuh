// The building blocks of the Hopper kernels, one PTX instruction each: mbarriers, TMA, named barriers, registers of a
// warpgroup. wgmma.cuh has the matrix products, common.cuh the instructions of programmatic dependent launch.
//
// Kernels include them through kernel_hopper.cuh.
//
// Source: PTX ISA 8.x, the instruction named in each comment.
#pragma once

#include <cuda.h>

#include "common.cuh"
#include "hopper_layout.h"

namespace mixtral::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier: a phase completes after so many arrivals and all announced bytes

struct Barrier {
  uint64_t state;
};

// mbarrier.init. One thread; then fence_barrier_init() by it and __syncthreads().
__device__ __forceinline__ void init_barrier(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// fence.mbarrier_init, fence.proxy.async: the asynchronous copies see the initialised barriers.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// mbarrier.arrive
__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// mbarrier.arrive.expect_tx: arrives and announces bytes that TMA will bring.
__device__ __forceinline__ void arrive_expect_bytes(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity: until the phase of that parity has completed; parity 1 passes on a fresh barrier.
__device__ __forceinline__ void wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra passed;\n"
      "bra again;\n"
      "passed:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- TMA: boxes of a tensor between global and shared memory

using TensorMap = CUtensorMap;  // kernels take it as `const __grid_constant__ TensorMap`

// How long a box stays in L2 (createpolicy values as CUTLASS's TMA::CacheHintSm90 documents them).
enum class L2Policy : uint64_t {
  kNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,  // read once, as weights in decoding
  kEvictLast = 0x14F0000000000000,   // read again soon, as activations
};

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor: the box at the coordinates (innermost first) -> shared memory; its bytes arrive at `barrier`.
// Values outside the tensor are zeros.
__device__ __forceinline__ void load_box(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1,
                                         L2Policy policy = L2Policy::kNormal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "l"(static_cast<uint64_t>(policy))
      : "memory");
}

__device__ __forceinline__ void load_box(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2,
                                         L2Policy policy = L2Policy::kNormal) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(static_cast<uint64_t>(policy))
      : "memory");
}

__device__ __forceinline__ void load_box(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2,
                                         int c3, L2Policy policy = L2Policy::kNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(static_cast<uint64_t>(policy))
      : "memory");
}

// cp.async.bulk: `bytes` (a multiple of 16) contiguous bytes -> shared memory.
__device__ __forceinline__ void load_bytes(void* shared, const void* global, uint32_t bytes, Barrier* barrier,
                                           L2Policy policy = L2Policy::kNormal) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(static_cast<uint64_t>(policy))
      : "memory");
}

// fence.proxy.async: what this thread wrote to shared memory becomes visible to TMA and wgmma; a barrier follows.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- copies by threads: cp.async, 16 bytes each, zeros where not `valid`

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- threads

// bar.sync, bar.arrive: barrier 1 to 15 among `threads` threads (0 is __syncthreads).
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// setmaxnreg: all warps of a warpgroup; a multiple of 8 in [24, 256].
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- fragments

// ldmatrix, stmatrix: four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void store_matrices(void* shared, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(shared)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(void* shared, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(shared)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// mma m16n8k16, bf16 with f32 sums, by one warp. Row r of a: registers 0, 2 of lanes 4 (r % 8) .. + 3 (1, 3 for r >=
// 8).
__device__ __forceinline__ void mma_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ex2.approx.ftz: 2^x within 2 ulp; 2^0 is 1 and 2^-inf is 0. Volatile, so that the compiler does not move it behind a
// wait for products that run meanwhile.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// cvt.rn.bf16x2: two values rounded to bf16, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The values of a pair of bf16.
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000); }

// cvt.rn.satfinite.e4m3x2: two values rounded to e4m3, at most 448 in size, `low` in the lower half.
__device__ __forceinline__ uint16_t pack_e4m3(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}

// lop3.b32: bits & mask | set in one instruction; with constants the compiler makes two.
__device__ __forceinline__ uint32_t and_or(uint32_t bits, uint32_t mask, uint32_t set) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(bits), "r"(mask), "r"(set));
  return result;
}

// sub.rn.bf16x2, mul.rn.bf16x2: of two pairs, each value rounded once.
__device__ __forceinline__ uint32_t subtract_bf16_pair(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}
__device__ __forceinline__ uint32_t multiply_bf16_pair(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

}  // namespace mixtral::cuda
