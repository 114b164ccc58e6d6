// Memory that starts at a cache line: a tile or vector load of a row of 64 bytes then touches one line, not two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../host_device.h"

namespace mixtral::cpu {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) { grow(size); }

  T* at(int64_t i) { return reinterpret_cast<T*>(lines_.data()) + i; }

  // Makes room for `size` values; the contents may be lost.
  T* grow(int64_t size) {
    const auto lines = static_cast<size_t>(ceil_div(size * static_cast<int64_t>(sizeof(T)), sizeof(Line)));
    if (lines_.size() < lines) lines_ = std::vector<Line>(lines);
    return at(0);
  }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64] = {};
  };
  std::vector<Line> lines_;
};

}  // namespace mixtral::cpu
