// How a process becomes one of the ranks that hold a model.
#pragma once

#include <memory>
#include <string>

#include "communicator.h"

namespace mixtral {

struct RankOptions {
  int tensor_size = 1, stages = 1;
  bool expert_parallel = true;
  std::string backend = "auto";  // "shm", "gloo", "nccl"; auto: shm where all ranks are on this host and on the CPU
  std::string device = "cpu";
  double timeout = 30;  // seconds that a rank may be silent while another one waits for it
};

// The ranks that this process is one of. Without a RANK in the environment, the process is rank 0 and starts the others
// as its children: the same program with the same arguments. They end with it, however it ends. With one (torchrun), it
// joins those that are there. Null for a single rank.
//
// Throws std::invalid_argument for sizes that do not fit WORLD_SIZE, RankError when another rank does not come.
std::shared_ptr<Communicator> join_ranks(const RankOptions& options);

// Every rank must have the same description of what it is about to do: build, configuration, weights, types, layout.
// Throws LoadError with the first line that differs, and the two ranks that have it so.
void check_same(Communicator& world, const std::string& description);

}  // namespace mixtral
