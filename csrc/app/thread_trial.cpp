#include "thread_trial.h"

#include <future>
#include <vector>

namespace mixtral::app {

void try_threads(int64_t count) {
  std::vector<std::future<void>> threads;
  std::promise<void> gate;  // destroyed before the threads are joined: that lets them go
  const std::shared_future<void> open = gate.get_future().share();
  for (int64_t i = 0; i < count; ++i) threads.push_back(std::async(std::launch::async, [open] { open.wait(); }));
}

}  // namespace mixtral::app
