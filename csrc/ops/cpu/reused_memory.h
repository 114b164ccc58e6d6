// Memory for large tensors that every training step makes anew, such as the gradients of experts' weights.
//
// The allocator of the system gives large blocks back to the kernel when they are freed, and the kernel clears every
// page of a new one, which takes most of the time of the product that fills it (docs/cpu.md). Here a block that was
// freed serves the next tensor of its size. Until then its pages are the kernel's to take when memory runs short
// (MADV_FREE). Large pages are not asked for: they were no faster in used memory, and where the system has none at
// hand, one takes several times as long as the small ones in its place (docs/cpu.md).
#pragma once

#include <cstddef>

namespace mixtral::cpu {

// Uninitialised and page-aligned; null when the system has no more memory. Any thread may call these.
void* take_memory(size_t bytes);
// `bytes` as they were taken.
void return_memory(void* data, size_t bytes);

struct MemoryInUse {
  size_t taken, idle;  // bytes
};
MemoryInUse memory_in_use();

}  // namespace mixtral::cpu
