// wgmma: products of a warpgroup (128 threads), asynchronous, with f32 sums in registers.
//
//   fence_accumulators(); multiply_...(); commit_products(); wait_products<0>();
//
// a [64, depth] and b [N, depth], depth 16 for bf16 and 32 for e4m3, through matrix descriptors (hopper_layout.h), or a
// from registers: four words as mma_bf16 takes them, warp w holding rows 16 w .. + 15. Until the wait, neither the sums
// nor registers of a may be touched. `accumulate` false starts from zero.
//
// Source: PTX ISA 8.x, wgmma.mma_async, wgmma.fence, wgmma.commit_group, wgmma.wait_group.
#pragma once

#include "hopper.cuh"

namespace mixtral::cuda {

// Before the first product, and whenever registers that a product uses were written by other instructions.
__device__ __forceinline__ void fence_accumulators() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// What other instructions write to the sums stays before this point, what they read behind it: the compiler knows no
// such order, and serialises products where it moved an instruction between them.
template <int kValues>
__device__ __forceinline__ void keep_order(float (&sums)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The same, and no use of these sums moves before the wait: the compiler sees no tie between a product and its wait.
template <int kPending, int kSums>
__device__ __forceinline__ void wait_products(float (&sums)[kSums]) {
  wait_products<kPending>();
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Inline assembly names every register, so a product exists once for each N.
template <int N>
struct Wgmma;

// LIST, SUMS: the N / 2 sums as operands of the assembly; P0 to P6: the numbers of the operands behind them.
#define MIXTRAL_WGMMA(N, LIST, SUMS, P0, P1, P2, P3, P4, P5, P6)                                                      \
  template <>                                                                                                         \
  struct Wgmma<N> {                                                                                                   \
    static __device__ __forceinline__ void bf16(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                             \
                   ", 0;\n"                                                                                           \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, " P0 ", " P1                 \
                   ", p, 1, 1, 0, 0;\n}"                                                                              \
                   : SUMS                                                                                             \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                \
    }                                                                                                                 \
    template <int kTransposed>                                                                                        \
    static __device__ __forceinline__ void bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,                \
                                                int accumulate) {                                                     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5                                                             \
                   ", 0;\n"                                                                                           \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, {" P0 "," P1 "," P2 "," P3   \
                   "}, " P4 ", p, 1, 1, " P6 ";\n}"                                                                   \
                   : SUMS                                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposed));          \
    }                                                                                                                 \
    static __device__ __forceinline__ void e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                             \
                   ", 0;\n"                                                                                           \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" LIST "}, " P0 ", " P1 ", p, 1, 1;\n}" \
                   : SUMS                                                                                             \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                \
    }                                                                                                                 \
  }

// The sums as operands: each list is the one before and as many more.
#define MIXTRAL_LIST_8 "%0,%1,%2,%3"
#define MIXTRAL_SUMS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define MIXTRAL_LIST_16 \
  MIXTRAL_LIST_8        \
  ","                   \
  "%4,%5,%6,%7"
#define MIXTRAL_SUMS_16 MIXTRAL_SUMS_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define MIXTRAL_LIST_32 \
  MIXTRAL_LIST_16       \
  ","                   \
  "%8,%9,%10,%11,%12,%13,%14,%15"
#define MIXTRAL_SUMS_32 \
  MIXTRAL_SUMS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define MIXTRAL_LIST_64 \
  MIXTRAL_LIST_32       \
  ","                   \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MIXTRAL_SUMS_64                                                                                       \
  MIXTRAL_SUMS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), \
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), \
      "+f"(d[31])
#define MIXTRAL_LIST_128                                                                                         \
  MIXTRAL_LIST_64                                                                                                \
  ","                                                                                                            \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define MIXTRAL_SUMS_128                                                                                      \
  MIXTRAL_SUMS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), \
      "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), \
      "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), \
      "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
      "+f"(d[63])
#define MIXTRAL_LIST_256                                                                                         \
  MIXTRAL_LIST_128                                                                                               \
  ","                                                                                                            \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90," \
  "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,"   \
  "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MIXTRAL_SUMS_256                                                                                              \
  MIXTRAL_SUMS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]),        \
      "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]),         \
      "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]),         \
      "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]),         \
      "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]),      \
      "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), \
      "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), \
      "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), \
      "+f"(d[127])

MIXTRAL_WGMMA(8, MIXTRAL_LIST_8, MIXTRAL_SUMS_8, "%4", "%5", "%6", "%7", "%8", "%9", "%10");
MIXTRAL_WGMMA(16, MIXTRAL_LIST_16, MIXTRAL_SUMS_16, "%8", "%9", "%10", "%11", "%12", "%13", "%14");
MIXTRAL_WGMMA(32, MIXTRAL_LIST_32, MIXTRAL_SUMS_32, "%16", "%17", "%18", "%19", "%20", "%21", "%22");
MIXTRAL_WGMMA(64, MIXTRAL_LIST_64, MIXTRAL_SUMS_64, "%32", "%33", "%34", "%35", "%36", "%37", "%38");
MIXTRAL_WGMMA(128, MIXTRAL_LIST_128, MIXTRAL_SUMS_128, "%64", "%65", "%66", "%67", "%68", "%69", "%70");
MIXTRAL_WGMMA(256, MIXTRAL_LIST_256, MIXTRAL_SUMS_256, "%128", "%129", "%130", "%131", "%132", "%133", "%134");

#undef MIXTRAL_WGMMA
#undef MIXTRAL_LIST_8
#undef MIXTRAL_SUMS_8
#undef MIXTRAL_LIST_16
#undef MIXTRAL_SUMS_16
#undef MIXTRAL_LIST_32
#undef MIXTRAL_SUMS_32
#undef MIXTRAL_LIST_64
#undef MIXTRAL_SUMS_64
#undef MIXTRAL_LIST_128
#undef MIXTRAL_SUMS_128
#undef MIXTRAL_LIST_256
#undef MIXTRAL_SUMS_256

// a [64, 16], b [N, 16], both with contiguous depths
template <int N>
__device__ __forceinline__ void multiply_bf16(float (&sums)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<N>::bf16(sums, a, b, accumulate);
}

// The same with a from registers; kTransposed: b is [16, N] with N contiguous.
template <int N, bool kTransposed>
__device__ __forceinline__ void multiply_bf16(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                              bool accumulate) {
  Wgmma<N>::template bf16<kTransposed>(sums, a, b, accumulate);
}

// a [64, 32], b [N, 32], both with contiguous depths
template <int N>
__device__ __forceinline__ void multiply_e4m3(float (&sums)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<N>::e4m3(sums, a, b, accumulate);
}

}  // namespace mixtral::cuda
