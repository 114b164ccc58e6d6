#include "threads.h"

#include <ATen/Parallel.h>

namespace mixtral {

int num_threads() { return at::get_num_threads(); }

void use_threads(int count) {
  if (count != at::get_num_threads()) at::set_num_threads(count);
}

}  // namespace mixtral
