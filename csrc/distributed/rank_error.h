// The exception of processes that need each other.
#pragma once

#include <stdexcept>
#include <string>

namespace mixtral {

// A rank ended, failed, or was silent for too long. what() names it and says why, where it could still say so itself.
struct RankError : std::runtime_error {
  RankError(int rank, const std::string& reason)
      : std::runtime_error("rank " + std::to_string(rank) + " " + reason), rank(rank) {}
  int rank;
};

}  // namespace mixtral
