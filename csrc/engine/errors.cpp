#include "errors.h"

#include <c10/util/Exception.h>

#include <cstring>
#include <new>

#include "../model/memory.h"

namespace mixtral {

std::optional<TorchError> torch_error(const std::exception& error) noexcept {
  const auto* const torch = dynamic_cast<const c10::Error*>(&error);
  if (!torch) return std::nullopt;
  const char* const message = torch->what_without_backtrace();
  // The CPU allocator throws a plain c10::Error.
  const bool out_of_memory =
      dynamic_cast<const c10::OutOfMemoryError*>(torch) || std::strstr(message, "DefaultCPUAllocator");
  return TorchError{out_of_memory, message};
}

bool is_out_of_memory(const std::exception& error) noexcept {
  const auto torch = torch_error(error);
  // The ops allocate through a C interface of torch, which passes on no more than that it failed (ops/tensors.h).
  return dynamic_cast<const std::bad_alloc*>(&error) || dynamic_cast<const OutOfMemory*>(&error) ||
         (torch && torch->out_of_memory) || std::strstr(error.what(), "aoti_torch_empty_strided");
}

}  // namespace mixtral
