#include "parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

namespace mixtral {

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const std::function<void(int64_t, int64_t)>*>(context))(begin, end);
  };
  void* const context = const_cast<void*>(static_cast<const void*>(&body));
  if (torch_parallel_for(0, count, grain, call, context) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("parallel_for: the loop failed");
}

}  // namespace mixtral
