// What the ranks of one pipeline stage tell each other about activations. Alone, a rank has everything already, and the
// functions give back what they got.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../distributed/communicator.h"
#include "libtorch.h"
#include "placement.h"

namespace mixtral {

// The ranks that compute the same layers, each of them a part of every matrix.
class TensorGroup {
 public:
  // world: all ranks of the model; null for one, and for a part that is only loaded. Throws std::invalid_argument
  // unless this rank is that of `placement`.
  TensorGroup(const Placement& placement, const std::shared_ptr<Communicator>& world);

  int rank() const { return rank_; }
  int size() const { return size_; }

  // columns [T,n] of each rank -> [T,size*n], those of rank 0 first.
  torch::Tensor gather_columns(const torch::Tensor& columns) const;
  // The same for rank 0; undefined elsewhere.
  torch::Tensor gather_columns_to_first(const torch::Tensor& columns) const;
  // rows[r] rows of `all` come from rank r, which has written them there; those of rank 0 come first.
  void gather_rows(const torch::Tensor& all, const std::vector<int64_t>& rows) const;
  // The sum of the parts of all ranks, in f32, in their order, rounded once.
  torch::Tensor sum(const torch::Tensor& part) const;

 private:
  int rank_, size_;
  std::shared_ptr<Communicator> ranks_;  // null for one
};

}  // namespace mixtral
