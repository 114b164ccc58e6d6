#include "device_arena.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../io/new_pages.h"

namespace mixtral {
namespace {

// Streams and events through the interface that all devices of torch share, so that no header of CUDA is needed.
class StreamArena : public DeviceArena {
 public:
  explicit StreamArena(torch::Device device)
      : guard_(device.type()),
        device_(device.has_index() ? device : guard_.getDevice()),
        copies_(guard_.getStreamFromGlobalPool(device_)),
        copied_{c10::Event(device.type()), c10::Event(device.type())},
        released_{c10::Event(device.type()), c10::Event(device.type())} {}

  torch::Device device() const override { return device_; }

  torch::Tensor allocate(const torch::Tensor& host) override {
    return torch::empty(host.sizes(), host.options().device(device_));
  }

  void fetch(int buffer, const torch::Tensor& host, const torch::Tensor& to) override {
    PageLocked& from = page_locked(host, to);
    if (from.copied.was_marked_for_recording()) from.copied.synchronize();  // the copy before has left this memory
    from.memory.copy_(host);
    const c10::StreamGuard on(copies_);
    if (released_[buffer].was_marked_for_recording()) released_[buffer].block(copies_);
    to.copy_(from.memory, /*non_blocking=*/true);
    from.copied.record(copies_);
    copied_[buffer].record(copies_);
  }

  void await(int buffer) override { copied_[buffer].block(guard_.getStream(device_)); }
  void release(int buffer) override { released_[buffer].record(guard_.getStream(device_)); }

 private:
  struct PageLocked {
    torch::Tensor memory;
    c10::Event copied;
  };
  // What is copied to `to` goes through it: copies from other memory would hold up this thread.
  PageLocked& page_locked(const torch::Tensor& host, const torch::Tensor& to) {
    const auto found = page_locked_.find(to.data_ptr());
    if (found != page_locked_.end()) return found->second;
    const auto memory = torch::empty(host.sizes(), host.options().pinned_memory(true));
    return page_locked_.emplace(to.data_ptr(), PageLocked{memory, c10::Event(device_.type())}).first->second;
  }

  const c10::impl::VirtualGuardImpl guard_;
  const torch::Device device_;
  const c10::Stream copies_;
  c10::Event copied_[2], released_[2];  // of the buffers
  std::map<const void*, PageLocked> page_locked_;
};

class SimulatedArena : public DeviceArena {
 public:
  torch::Device device() const override { return torch::kCPU; }

  torch::Tensor allocate(const torch::Tensor& host) override {
    auto memory = torch::empty(host.sizes(), host.options());
    // In such pages as those of the model.
    LargePages().bring(pages_around(memory.data_ptr(), memory.nbytes()));
    return memory;
  }

  void fetch(int buffer, const torch::Tensor& host, const torch::Tensor& to) override {
    if (in_use_[buffer]) throw std::logic_error("fetch into a buffer that is in use");
    pending_[buffer].emplace_back(host, to);
  }

  void await(int buffer) override {
    for (const auto& [host, to] : pending_[buffer]) to.copy_(host);
    pending_[buffer].clear();
    in_use_[buffer] = true;
  }

  void release(int buffer) override { in_use_[buffer] = false; }

 private:
  std::vector<std::pair<torch::Tensor, torch::Tensor>> pending_[2];  // (host, to) of the buffers
  bool in_use_[2] = {false, false};
};

}  // namespace

std::unique_ptr<DeviceArena> make_arena(torch::Device device) {
  if (device.is_cpu()) return std::make_unique<SimulatedArena>();
  return std::make_unique<StreamArena>(device);
}

}  // namespace mixtral
