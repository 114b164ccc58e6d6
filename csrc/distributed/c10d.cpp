#include "c10d.h"

#include <chrono>
#include <cstdlib>
#include <deque>
#include <optional>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <utility>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace mixtral {
namespace {

// A send is kept until its receiver has it. Gloo cannot be asked whether it has, only be waited for, so that is done
// for the oldest ones when there are many: they went long ago.
constexpr size_t kMostSends = 64;
constexpr size_t kMostBytesOfSends = size_t{64} << 20;

using Clock = std::chrono::steady_clock;

class C10dCommunicator : public Communicator {
 public:
  C10dCommunicator(std::shared_ptr<RankStore> store, torch::Device device)
      : store_(std::move(store)), device_(device) {}

  int rank() const override { return rendezvous().rank; }
  int size() const override { return rendezvous().size; }
  torch::Device device() const override { return device_; }
  uint64_t bytes_sent() const override { return bytes_sent_; }
  std::vector<std::string> exchange_texts(const std::string& own) override { return store_->exchange_texts(own); }
  void keep_alive() noexcept override { store_->keep_alive(); }
  void fail(const std::string& reason) noexcept override { store_->fail(rank(), "failed: " + reason); }

 protected:
  using Work = c10::intrusive_ptr<c10d::Work>;
  const Rendezvous& rendezvous() const { return store_->rendezvous(); }

  std::chrono::milliseconds timeout() const {
    return std::chrono::milliseconds(static_cast<int64_t>(rendezvous().timeout * 1000));
  }

  // Does what concerns one other rank. Whatever goes wrong there, the rank is the one to be named.
  template <typename Action>
  auto with_rank(int peer, const Action& action) {
    if (broken_) throw *broken_;
    const auto start = Clock::now();
    try {
      return action();
    } catch (const std::exception&) {
      try {
        store_->throw_cause(peer, Clock::now() - start >= 0.9 * timeout());
      } catch (const RankError& error) {
        broken_ = error;
        throw;
      }
    }
  }

  const std::shared_ptr<RankStore> store_;
  const torch::Device device_;
  std::optional<RankError> broken_;
  uint64_t bytes_sent_ = 0;
};

class GlooCommunicator final : public C10dCommunicator {
 public:
  GlooCommunicator(std::shared_ptr<RankStore> store, const std::string& address)
      : C10dCommunicator(std::move(store), torch::kCPU), sends_(size()) {
    using Gloo = c10d::ProcessGroupGloo;
    const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
    const auto options = Gloo::Options::create(timeout());
    options->devices.push_back(interface ? Gloo::createDeviceForInterface(interface)
                                         : Gloo::createDeviceForHostname(address));
    options->threads = 1;
    const auto keys = c10::make_intrusive<c10d::PrefixStore>("gloo", store_->keys());
    group_ = c10::make_intrusive<Gloo>(keys, rank(), size(), options);
  }
  ~GlooCommunicator() override {  // what was sent has not left before somebody receives it
    try {
      for (int peer = 0; peer < size() && !broken_; ++peer) {
        while (!sends_[peer].works.empty()) finish_oldest(peer);
      }
    } catch (const std::exception&) {
    }
    store_->end();  // before the connections are closed
  }

  void exchange(const std::vector<Send>& sends, const std::vector<Receive>& receives) override {
    for (const auto& [tensor, to] : sends) check_message(tensor, to);
    for (const auto& [tensor, from] : receives) check_message(tensor, from);
    std::vector<std::pair<int, Work>> receiving;
    for (const auto& [tensor, from] : receives) {
      if (tensor.nbytes() == 0) continue;
      std::vector<torch::Tensor> tensors = {tensor};
      receiving.emplace_back(from, with_rank(from, [&, from = from] { return group_->recv(tensors, from, kTag); }));
    }
    for (const auto& [tensor, to] : sends) {
      if (tensor.nbytes() == 0) continue;
      std::vector<torch::Tensor> copies = {tensor.clone()};
      Sends& pending = sends_[to];
      pending.works.push_back(
          {with_rank(to, [&, to = to] { return group_->send(copies, to, kTag); }), tensor.nbytes()});
      pending.bytes += tensor.nbytes();
      bytes_sent_ += tensor.nbytes();
    }
    for (const auto& [from, work] : receiving) with_rank(from, [&work = work] { return work->wait(); });
    for (const auto& [tensor, to] : sends) {
      const Sends& pending = sends_[to];
      while (pending.works.size() > 1 && (pending.works.size() > kMostSends || pending.bytes > kMostBytesOfSends))
        finish_oldest(to);
    }
  }

 private:
  static constexpr int kTag = 0;
  struct Sends {
    std::deque<std::pair<Work, size_t>> works;
    size_t bytes = 0;
  };

  void finish_oldest(int peer) {
    Sends& pending = sends_[peer];
    const auto [work, bytes] = std::move(pending.works.front());
    pending.works.pop_front();
    pending.bytes -= bytes;
    with_rank(peer, [&work = work] { return work->wait(); });
  }

  c10::intrusive_ptr<c10d::ProcessGroupGloo> group_;
  std::vector<Sends> sends_;  // to each rank
};

#ifdef USE_C10D_NCCL
// Not yet run on a GPU. Returns when everything is in the stream: what comes after it there sees the received tensors.
// NCCL's own watchdog ends a process whose peer is silent.
class NcclCommunicator final : public C10dCommunicator {
 public:
  NcclCommunicator(std::shared_ptr<RankStore> store, torch::Device device)
      : C10dCommunicator(std::move(store), device) {
    const auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = timeout();
    const auto keys = c10::make_intrusive<c10d::PrefixStore>("nccl", store_->keys());
    group_ = c10::make_intrusive<c10d::ProcessGroupNCCL>(keys, rank(), size(), options);
    group_->setBoundDeviceId(device);
    group_->eagerConnectSingleDevice(device);
  }
  ~NcclCommunicator() override { store_->end(); }

  void exchange(const std::vector<Send>& sends, const std::vector<Receive>& receives) override {
    if (sends.empty() && receives.empty()) return;
    for (const auto& [tensor, to] : sends) check_message(tensor, to);
    for (const auto& [tensor, from] : receives) check_message(tensor, from);
    with_rank(sends.empty() ? receives[0].from : sends[0].to, [&] {
      group_->startCoalescing();
      for (const auto& [tensor, from] : receives) {
        std::vector<torch::Tensor> tensors = {tensor};
        if (tensor.nbytes() > 0) group_->recv(tensors, from, /*tag=*/0);
      }
      for (const auto& [tensor, to] : sends) {
        std::vector<torch::Tensor> tensors = {tensor};
        if (tensor.nbytes() > 0) group_->send(tensors, to, /*tag=*/0);
        bytes_sent_ += tensor.nbytes();
      }
      if (const Work work = group_->endCoalescing()) work->wait();
      return true;
    });
  }

 private:
  c10::intrusive_ptr<c10d::ProcessGroupNCCL> group_;
};
#endif

}  // namespace

namespace {

std::shared_ptr<Communicator> connect(const std::shared_ptr<RankStore>& store, const std::string& backend,
                                      const std::string& address, [[maybe_unused]] torch::Device device) {
  if (backend == "gloo") return std::make_shared<GlooCommunicator>(store, address);
#ifdef USE_C10D_NCCL
  if (backend == "nccl") return std::make_shared<NcclCommunicator>(store, device);
#endif
  throw std::runtime_error("this build has no parallel backend " + backend);
}

}  // namespace

std::shared_ptr<Communicator> join_c10d(std::shared_ptr<RankStore> store, const std::string& backend,
                                        const std::string& address, torch::Device device) {
  store->exchange_texts("");  // all are there: connecting would wait for them without a word
  std::shared_ptr<Communicator> ranks;
  try {
    ranks = connect(store, backend, address, device);
  } catch (const std::exception& error) {
    const std::string text = error.what(),
                      reason = "cannot connect over " + backend + ": " + text.substr(0, text.find('\n'));
    store->fail(store->rendezvous().rank, "failed: " + reason);
    store->throw_if_failed();
    throw std::runtime_error(reason);  // the store is gone
  }
  store->exchange_texts("");  // a rank that ended now would break the connections that others still make
  return ranks;
}

}  // namespace mixtral
