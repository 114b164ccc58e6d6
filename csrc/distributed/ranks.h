// How a process becomes one of the ranks that hold a model. No torch in here.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace mixtral {

class Communicator;

struct RankOptions {
  int tensor_size = 1, stages = 1;
  bool expert_parallel = true;
  std::string backend = "auto";  // "shm", "gloo", "nccl"; auto: shm where all ranks are on this host and on the CPU
  std::string device = "cpu";
  double timeout = 30;  // seconds that a rank may be silent while another one waits for it
  // What the other ranks run where this process starts them: a program, found as the shell finds it, and its arguments.
  // Empty: this process's own.
  std::vector<std::string> command = {};
};

// The ranks that this process is one of. Without RANK and WORLD_SIZE in the environment, the process is rank 0 and
// starts the others as its children, with both set; this call makes those join it. They read nothing, write to stderr
// alone, are not interrupted by signals to the whole process group, and end with the leader, however it ends:
// destroying what this returns waits two seconds for them to end by themselves, and does nothing in a fork of this
// process. With both (torchrun), it joins those that are there. Null for a single rank.
//
// Cores are divided among the ranks of this host: operators use that many threads, unless OMP_NUM_THREADS is set. Call
// use_threads() afterwards for another number.
//
// Throws std::invalid_argument for options that cannot be, LoadError for sizes that do not fit WORLD_SIZE, RankError
// when another rank does not come.
std::shared_ptr<Communicator> join_ranks(const RankOptions& options);

// How they speak, of a process that has not started or joined them yet, or is rank 0: "shm", "gloo" or "nccl".
std::string backend_of(const RankOptions& options);
// Whether this process is a rank that another one has started; until it has joined.
bool is_child_rank();

// Every rank must have the same description of what it is about to do: build, configuration, weights, types, layout.
// Throws LoadError with the first line that differs, and the two ranks that have it so.
void check_same(Communicator& world, const std::string& description);

// Calls `load`, which must call world.keep_alive() more often than the timeout, and waits for the others. When a rank's
// throws, that rank throws the same, and the others a LoadError that names the rank and says why.
void load_together(Communicator& world, const std::function<void()>& load);

}  // namespace mixtral
