// What the processes of one model exchange. Each of them is a rank.
//
//   communicator.h   sends, receives, and the collectives made of them
//   shm              ranks of one host, on the CPU: a ring of bytes in shared memory for each pair
//   c10d             torch's process groups: Gloo over TCP, NCCL
//   store            where those find each other, and leave the reason of a failure
//   ranks            how a process becomes one of the ranks: as a local child, or of torchrun
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../model/libtorch.h"
#include "rank_error.h"

namespace mixtral {

// Messages between two ranks arrive in the order in which they were sent; both sides know their sizes. Tensors are
// contiguous, and lie on device(). Used by one thread at a time. Throws RankError, after which the communicator is of
// no more use. Destroying it says to the others that this rank ends as it should: a rank that still waits for it fails,
// but the others do not.
class Communicator {
 public:
  struct Send {
    torch::Tensor tensor;
    int to;
  };
  struct Receive {
    torch::Tensor tensor;  // is overwritten
    int from;
  };

  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual torch::Device device() const { return torch::kCPU; }

  // Does all of them at once, in any order between different ranks, so that ranks that send to each other do not wait
  // for each other. Returns when everything is received, and every sent tensor may be changed; it may not have arrived.
  virtual void exchange(const std::vector<Send>& sends, const std::vector<Receive>& receives) = 0;

  // The text of each rank, in their order. Texts may have any sizes. Waits for ranks that call keep_alive().
  virtual std::vector<std::string> exchange_texts(const std::string& own);
  // Says that this rank is busy, such as with reading weights, and not silent. Cheap; ranks that exchange_texts() may
  // then wait for this one for longer than the timeout.
  virtual void keep_alive() noexcept = 0;
  // Why this rank ends, for the RankError that the others get: "rank 1 failed: <reason>".
  virtual void fail(const std::string& reason) noexcept = 0;

  virtual uint64_t bytes_sent() const = 0;  // of tensors

  // The collectives. Every rank of the communicator calls the same ones in the same order.
  void send(const torch::Tensor& tensor, int to) { exchange({{tensor, to}}, {}); }
  void receive(const torch::Tensor& tensor, int from) { exchange({}, {{tensor, from}}); }
  void broadcast(const torch::Tensor& tensor, int root);
  // rows[r] entries of the first dimension of `all` come from rank r, which has written them there; those of rank 0
  // come first. Rows may be 0.
  void all_gather(const torch::Tensor& all, const std::vector<int64_t>& rows);
  // The same for `root` alone; elsewhere only the rank's own rows of `all` are read.
  void gather(const torch::Tensor& all, const std::vector<int64_t>& rows, int root);
  // The sum over the ranks, in f32, in their order, rounded once to the dtype of `tensor`: the same bits on every rank.
  torch::Tensor all_reduce_ordered(const torch::Tensor& tensor);
  void barrier();

 protected:
  // Throws std::invalid_argument for a message that no other rank has a part in: the caller's mistake.
  void check_message(const torch::Tensor& tensor, int peer) const;
};

// The ranks `members` of another communicator, numbered in this order; this rank is one of them. exchange_texts() and
// bytes_sent() are the whole communicator's, and so are the numbers of a RankError.
std::shared_ptr<Communicator> subgroup(std::shared_ptr<Communicator> whole, std::vector<int> members);

}  // namespace mixtral
