#include "communicator.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace mixtral {
namespace {

// Where the rows of each rank begin, and after them the number of all rows.
std::vector<int64_t> row_offsets(const torch::Tensor& all, const std::vector<int64_t>& rows, int size) {
  std::vector<int64_t> offsets(rows.size() + 1);
  std::partial_sum(rows.begin(), rows.end(), offsets.begin() + 1);
  if (static_cast<int>(rows.size()) != size || all.size(0) != offsets.back()) {
    throw std::invalid_argument("gather: " + std::to_string(offsets.back()) + " rows of " +
                                std::to_string(rows.size()) + " ranks, but a tensor of " + std::to_string(all.size(0)) +
                                " rows and " + std::to_string(size) + " ranks");
  }
  return offsets;
}

class Subgroup final : public Communicator {
 public:
  Subgroup(std::shared_ptr<Communicator> whole, std::vector<int> members)
      : whole_(std::move(whole)), members_(std::move(members)) {
    const auto own = std::find(members_.begin(), members_.end(), whole_->rank());
    if (own == members_.end())
      throw std::invalid_argument("rank " + std::to_string(whole_->rank()) + " is no member of its own subgroup");
    rank_ = static_cast<int>(own - members_.begin());
  }

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(members_.size()); }
  torch::Device device() const override { return whole_->device(); }
  void exchange(const std::vector<Send>& sends, const std::vector<Receive>& receives) override {
    std::vector<Send> to_members;
    std::vector<Receive> from_members;
    for (const auto& [tensor, to] : sends) to_members.push_back({tensor, members_.at(to)});
    for (const auto& [tensor, from] : receives) from_members.push_back({tensor, members_.at(from)});
    whole_->exchange(to_members, from_members);
  }
  std::vector<std::string> exchange_texts(const std::string& own) override { return whole_->exchange_texts(own); }
  void keep_alive() noexcept override { whole_->keep_alive(); }
  void fail(const std::string& reason) noexcept override { whole_->fail(reason); }
  uint64_t bytes_sent() const override { return whole_->bytes_sent(); }

 private:
  std::shared_ptr<Communicator> whole_;
  std::vector<int> members_;
  int rank_;
};

}  // namespace

std::vector<std::string> Communicator::exchange_texts(const std::string& own) {
  const torch::Tensor sizes = torch::empty({size()}, torch::kInt64);
  int64_t* const size_of = sizes.mutable_data_ptr<int64_t>();
  size_of[rank()] = static_cast<int64_t>(own.size());
  all_gather(sizes, std::vector<int64_t>(size(), 1));

  const std::vector<int64_t> rows(size_of, size_of + size());
  const torch::Tensor bytes = torch::empty({std::accumulate(rows.begin(), rows.end(), int64_t{0})}, torch::kByte);
  char* text = static_cast<char*>(bytes.mutable_data_ptr());
  std::copy(own.begin(), own.end(), text + std::accumulate(rows.begin(), rows.begin() + rank(), int64_t{0}));
  all_gather(bytes, rows);

  std::vector<std::string> texts;
  for (const int64_t length : rows) {
    texts.emplace_back(text, length);
    text += length;
  }
  return texts;
}

void Communicator::broadcast(const torch::Tensor& tensor, int root) {
  if (rank() != root) return receive(tensor, root);
  std::vector<Send> sends;
  for (int other = 0; other < size(); ++other) {
    if (other != root) sends.push_back({tensor, other});
  }
  exchange(sends, {});
}

void Communicator::all_gather(const torch::Tensor& all, const std::vector<int64_t>& rows) {
  const std::vector<int64_t> offsets = row_offsets(all, rows, size());
  const torch::Tensor own = all.narrow(0, offsets[rank()], rows[rank()]);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (int other = 0; other < size(); ++other) {
    if (other == rank()) continue;
    sends.push_back({own, other});
    receives.push_back({all.narrow(0, offsets[other], rows[other]), other});
  }
  exchange(sends, receives);
}

void Communicator::gather(const torch::Tensor& all, const std::vector<int64_t>& rows, int root) {
  const std::vector<int64_t> offsets = row_offsets(all, rows, size());
  if (rank() != root) return send(all.narrow(0, offsets[rank()], rows[rank()]), root);
  std::vector<Receive> receives;
  for (int other = 0; other < size(); ++other) {
    if (other != root) receives.push_back({all.narrow(0, offsets[other], rows[other]), other});
  }
  exchange({}, receives);
}

torch::Tensor Communicator::all_reduce_ordered(const torch::Tensor& tensor) {
  std::vector<torch::Tensor> parts(size(), tensor);
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (int other = 0; other < size(); ++other) {
    if (other == rank()) continue;
    parts[other] = torch::empty_like(tensor);
    sends.push_back({tensor, other});
    receives.push_back({parts[other], other});
  }
  exchange(sends, receives);
  torch::Tensor sum = parts[0].to(torch::kFloat32, /*non_blocking=*/false, /*copy=*/true);
  for (int other = 1; other < size(); ++other) sum.add_(parts[other].to(torch::kFloat32));
  return sum.to(tensor.scalar_type());
}

void Communicator::barrier() {
  all_gather(torch::zeros({size()}, torch::TensorOptions(torch::kByte).device(device())),
             std::vector<int64_t>(size(), 1));
}

void Communicator::check_message(const torch::Tensor& tensor, int peer) const {
  if (!tensor.is_contiguous() || tensor.device().type() != device().type())
    throw std::invalid_argument("exchange: tensors must be contiguous, and on " + device().str());
  if (peer < 0 || peer >= size() || peer == rank())
    throw std::invalid_argument("exchange: no messages between rank " + std::to_string(rank()) + " of " +
                                std::to_string(size()) + " and rank " + std::to_string(peer));
}

std::shared_ptr<Communicator> subgroup(std::shared_ptr<Communicator> whole, std::vector<int> members) {
  return std::make_shared<Subgroup>(std::move(whole), std::move(members));
}

}  // namespace mixtral
