#include "collectives.h"

#include <stdexcept>
#include <string>

namespace mixtral {
namespace {

// parts [size,T,n] -> [T,size*n]
torch::Tensor side_by_side(const torch::Tensor& parts) { return parts.transpose(0, 1).flatten(1); }

}  // namespace

TensorGroup::TensorGroup(const Placement& placement, const std::shared_ptr<Communicator>& world)
    : rank_(placement.tensor_rank), size_(placement.tensor_size) {
  if (!world) return;
  const int expected = placement.world_size();
  if (world->size() != expected || world->rank() != placement.rank()) {
    const auto name = [](int rank, int size) { return std::to_string(rank) + " of " + std::to_string(size); };
    throw std::invalid_argument("the model is placed on rank " + name(placement.rank(), expected) +
                                ", this process is rank " + name(world->rank(), world->size()));
  }
  if (size_ > 1) ranks_ = size_ == expected ? world : subgroup(world, placement.stage_ranks(placement.stage));
}

torch::Tensor TensorGroup::gather_columns(const torch::Tensor& columns) const {
  if (!ranks_) return columns;
  const auto parts = torch::empty({size_, columns.size(0), columns.size(1)}, columns.options());
  parts.select(0, rank_).copy_(columns);
  gather_rows(parts, std::vector<int64_t>(static_cast<size_t>(size_), 1));
  return side_by_side(parts);
}

torch::Tensor TensorGroup::gather_columns_to_first(const torch::Tensor& columns) const {
  if (!ranks_) return columns;
  const auto parts = torch::empty({size_, columns.size(0), columns.size(1)}, columns.options());
  parts.select(0, rank_).copy_(columns);
  ranks_->gather(parts, std::vector<int64_t>(static_cast<size_t>(size_), 1), /*root=*/0);
  return rank_ == 0 ? side_by_side(parts) : torch::Tensor();
}

void TensorGroup::gather_rows(const torch::Tensor& all, const std::vector<int64_t>& rows) const {
  if (ranks_ && all.numel() > 0) ranks_->all_gather(all, rows);
}

torch::Tensor TensorGroup::sum(const torch::Tensor& part) const {
  return ranks_ && part.numel() > 0 ? ranks_->all_reduce_ordered(part) : part;
}

}  // namespace mixtral
