#include "threads.h"

#include <ATen/Parallel.h>

// OpenMP 5.0. Not from omp.h, which the compiler has for its own runtime alone: torch brings one.
extern "C" int omp_pause_resource_all(int kind) __attribute__((weak));

namespace mixtral {

int num_threads() { return at::get_num_threads(); }

void use_threads(int count) {
  if (count != at::get_num_threads()) at::set_num_threads(count);
}

void release_idle_workers() {
  constexpr int kSoft = 1;  // omp_pause_soft: settings stay
  if (omp_pause_resource_all) omp_pause_resource_all(kSoft);
}

}  // namespace mixtral
