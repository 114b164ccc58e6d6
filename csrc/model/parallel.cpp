#include "parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <exception>
#include <mutex>
#include <stdexcept>

namespace mixtral {

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body) {
  struct Loop {
    const std::function<void(int64_t, int64_t)>& body;
    std::mutex mutex;
    std::exception_ptr error;  // torch would keep no more than that there was one
  } loop{body, {}, {}};
  const auto call = [](int64_t begin, int64_t end, void* context) {
    auto& [body, mutex, error] = *static_cast<Loop*>(context);
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  if (torch_parallel_for(0, count, grain, call, &loop) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("parallel_for: the loop failed");
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace mixtral
