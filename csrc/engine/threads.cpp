#include "threads.h"

#include <ATen/Parallel.h>

#include <future>
#include <vector>

namespace mixtral {

int num_threads() { return at::get_num_threads(); }

void use_threads(int count) {
  if (count != at::get_num_threads()) at::set_num_threads(count);
}

// torch waits for ever for threads of its pool that the system would not start, so all are tried first.
void set_num_threads(int64_t count) {
  {
    std::vector<std::future<void>> threads;
    std::promise<void> gate;  // destroyed before them: that lets them go
    const std::shared_future<void> open = gate.get_future().share();
    for (int64_t i = 0; i < count; ++i) threads.push_back(std::async(std::launch::async, [open] { open.wait(); }));
  }
  at::set_num_threads(static_cast<int>(count));
}

}  // namespace mixtral
