// What a core can do at most in f32: fused multiply-adds in registers. roofline.py compiles this for an instruction set
// and calls it from several threads.
#include <stddef.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define CHAINS 12  // two units with a latency of four need eight; AVX2 has 16 registers

typedef float Vector __attribute__((vector_size(4 * LANES)));

// Returns how many floating-point operations it did.
double multiply_add(size_t steps, float* result) {
  Vector chains[CHAINS], factor, term;
  for (int lane = 0; lane < LANES; ++lane) factor[lane] = 0.999f, term[lane] = 0.001f;
  for (int j = 0; j < CHAINS; ++j) chains[j] = term * (float)j;
  for (size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < CHAINS; ++j) chains[j] = chains[j] * factor + term;
  }
  *result = 0;
  for (int j = 0; j < CHAINS; ++j)
    for (int lane = 0; lane < LANES; ++lane) *result += chains[j][lane];
  return 2.0 * LANES * CHAINS * (double)steps;
}
