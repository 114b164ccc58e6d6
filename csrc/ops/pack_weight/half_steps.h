// Halves of steps whose values lie side by side in a packed block (pack_weight.h), as those of bf16 and int8 do.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"

namespace mixtral {

// Half `h`, of kBytes, of the steps of a block, one step after the other from `step` on.
template <int64_t kBytes>
class HalfSteps {
 public:
  MIXTRAL_INLINE HalfSteps(const char* block, int64_t, int64_t step, int64_t h)
      : next_(block + (2 * step + h) * kBytes) {}

  MIXTRAL_INLINE void begin_step() {
    at_ = next_;
    next_ += 2 * kBytes;
  }

 protected:
  const char* at_ = nullptr;  // the step

 private:
  const char* next_;
};

}  // namespace mixtral
