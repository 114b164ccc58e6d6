// The memory of a device that is too small for all experts, and the way of weights into it.
#pragma once

#include <memory>

#include "../model/libtorch.h"

namespace mixtral {

class DeviceArena {
 public:
  virtual ~DeviceArena() = default;
  virtual torch::Device device() const = 0;
  // Memory for a copy of `host`, not initialised.
  virtual torch::Tensor allocate(const torch::Tensor& host) = 0;
  // Begins to copy `host` into `to`, which is of staging buffer 0 or 1, when the work before release(buffer) is done.
  virtual void fetch(int buffer, const torch::Tensor& host, const torch::Tensor& to) = 0;
  // The work that is launched after this finds the fetches into `buffer` done.
  virtual void await(int buffer) = 0;
  // The work that was launched before this is the last to read `buffer`.
  virtual void release(int buffer) = 0;
};

// Of a device of torch that has streams: copies run on one of their own, through page-locked memory of the size of the
// staging buffers. Of the CPU: a part of its memory in the place of a device, to test and to measure without one; a
// fetch is done when it is waited for, the latest that is allowed, and one into a buffer in use is a std::logic_error.
std::unique_ptr<DeviceArena> make_arena(torch::Device device);

}  // namespace mixtral
