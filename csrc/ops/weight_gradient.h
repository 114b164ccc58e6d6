// The tensors that hold gradients of weights.
#pragma once

#include "cpu/reused_memory.h"
#include "tensors.h"

namespace mixtral {

// As new_tensor, [E, N, Kdim]. Every training step makes one, so what is large and on the CPU gets the memory of one
// that was freed (cpu/reused_memory.h). The allocator itself keeps blocks of up to 32 MiB.
inline Tensor new_weight_gradient(const Tensor& like, int64_t experts, int64_t columns, int64_t depth) {
  constexpr size_t kLarge = size_t{32} << 20;
  const size_t bytes = static_cast<size_t>(experts * columns * depth) * like.element_size();
  void* const data = like.is_cuda() || bytes < kLarge ? nullptr : cpu::take_memory(bytes);
  if (!data) return new_tensor(like, {experts, columns, depth});  // which reports that memory is short
  return torch::stable::from_blob(data, {experts, columns, depth}, {columns * depth, depth, 1}, like.device(),
                                  like.scalar_type(), [bytes](void* memory) { cpu::return_memory(memory, bytes); });
}

}  // namespace mixtral
