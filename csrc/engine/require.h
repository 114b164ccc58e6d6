// The check of an argument, as every call of the engine makes it.
#pragma once

#include <stdexcept>
#include <string>

namespace mixtral {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace mixtral
