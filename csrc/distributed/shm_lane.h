// The messages between one rank and another that are not done.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../model/libtorch.h"

namespace mixtral {

// To or from one rank, in their order.
struct Lane {
  struct Message {
    char* data;
    size_t left;
  };
  std::vector<Message> messages;
  size_t next = 0;

  bool done() const { return next == messages.size(); }
  void add(const torch::Tensor& tensor) {
    if (done()) messages.clear(), next = 0;
    if (tensor.nbytes() > 0) messages.push_back({static_cast<char*>(tensor.data_ptr()), tensor.nbytes()});
  }
  // Goes on while copy(data, size) can copy some bytes; it returns how many.
  template <typename Copy>
  bool advance(const Copy& copy) {
    bool moved = false;
    while (!done()) {
      Message& message = messages[next];
      const size_t count = copy(message.data, message.left);
      if (count == 0) return moved;
      moved = true;
      message.data += count;
      message.left -= count;
      if (message.left == 0) ++next;
    }
    return moved;
  }
};

// What a rank sent before it was wanted.
struct Inbox {
  std::string bytes;
  size_t taken = 0;

  size_t take(char* data, size_t count) {
    count = std::min(count, bytes.size() - taken);
    std::memcpy(data, bytes.data() + taken, count);
    taken += count;
    if (taken == bytes.size()) bytes.clear(), taken = 0;
    return count;
  }
};

}  // namespace mixtral
