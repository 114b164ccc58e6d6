// Ranks of one host, on the CPU: processes, or threads of one process. Every ordered pair of them has a ring of bytes
// in shared memory. A message is copied into the ring by one side and out of it by the other; a long one streams
// through.
#pragma once

#include <memory>
#include <vector>

#include "communicator.h"

namespace mixtral {

// The memory of a group of ranks: a file without a name, which other processes open by a descriptor that they inherit.
// It is gone with the last of them, however they end.
class ShmSegment {
 public:
  static std::shared_ptr<ShmSegment> create(int ranks);
  // Of a descriptor that it then owns. Throws std::runtime_error unless a program of the same build made it.
  static std::shared_ptr<ShmSegment> open(int descriptor);
  ~ShmSegment();

  int descriptor() const { return descriptor_; }  // is closed by exec
  int ranks() const;
  // Lets the others notice when the process ends before it has come.
  void expect(int rank, int process);

  struct Layout;
  Layout& layout() { return *layout_; }

 private:
  ShmSegment(int descriptor, size_t bytes);
  int descriptor_;
  size_t bytes_;
  Layout* layout_;
};

// `timeout`: seconds that a rank may be silent while this one waits for it. A rank that has not come yet is given a
// minute at least.
std::shared_ptr<Communicator> join_shm(std::shared_ptr<ShmSegment> segment, int rank, double timeout);

// All ranks of a group in one process, each to be used by a thread of its own.
std::vector<std::shared_ptr<Communicator>> shm_group(int size, double timeout);

}  // namespace mixtral
