#include "shm.h"

#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>

#include "shm_lane.h"
#include "shm_layout.h"
#include "waiting.h"

namespace mixtral {
namespace {

static_assert(std::atomic<int64_t>::is_always_lock_free, "processes share these");

// A rank that waits first spins, because the others work on the same layer and are nearly done; then it lets other
// threads of its core run; then it sleeps until somebody rings its bell.
constexpr int kSpins = 2000;
constexpr double kSecondsOfYields = 0.002;
constexpr double kSecondsOfSleep = 0.02;
// Between two looks at the clock; more passes only when this process itself was stopped, which is nobody's silence.
constexpr double kMostSecondsBetween = 0.1;
constexpr int64_t kNanosecondsBetweenLooks = 100'000'000;
constexpr int64_t kAliveNanoseconds = 500'000'000;  // a rank that waits shows itself more often than this

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void spin() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class ShmCommunicator final : public Communicator {
 public:
  ShmCommunicator(std::shared_ptr<ShmSegment> segment, int rank, double timeout)
      : segment_(std::move(segment)),
        layout_(segment_->layout()),
        rank_(rank),
        timeout_(timeout),
        out_(size()),
        in_(size()),
        inbox_(size()),
        processes_(size(), -1) {
    keep_alive();
    own().process = getpid();
    own().state = kRunning;
  }
  ~ShmCommunicator() override {
    own().state = kEnded;
    wake_all();
    for (const int process : processes_) {
      if (process >= 0) ::close(process);
    }
  }

  int rank() const override { return rank_; }
  int size() const override { return layout_.ranks; }
  uint64_t bytes_sent() const override { return bytes_sent_; }
  void keep_alive() noexcept override { own().seen_ns = now_ns(); }
  void fail(const std::string& reason) noexcept override {
    if (layout_.record(rank_, "failed: ", reason.c_str())) wake_all();
  }

  void exchange(const std::vector<Send>& sends, const std::vector<Receive>& receives) override {
    throw_if_failed();
    for (const auto& [tensor, to] : sends) check_message(tensor, to);
    for (const auto& [tensor, from] : receives) check_message(tensor, from);
    try {
      for (const auto& [tensor, to] : sends) {
        out_[to].add(tensor);
        bytes_sent_ += tensor.nbytes();
      }
      for (const auto& [tensor, from] : receives) in_[from].add(tensor);
      Wait wait;
      while (awaited() >= 0) {
        if (step())
          wait = {};
        else
          pause(wait);
      }
    } catch (...) {  // the tensors may be gone before the next call
      out_.assign(size(), {});
      in_.assign(size(), {});
      throw;
    }
    own().waits_for = 0;
    keep_alive();
    // A rank that only sends does not wait for anybody, and must notice too.
    if (own().seen_ns - looked_ns_ < kNanosecondsBetweenLooks) return;
    looked_ns_ = own().seen_ns;
    check_ended();
  }

 private:
  struct Wait {
    int spins = 0;
    int64_t last_ns = 0;
    double seconds = 0;          // without progress
    double seconds_blocked = 0;  // of these after the timeout, while every rank that is waited for waits itself
  };

  RankSlot& own() { return layout_.slot(rank_); }

  // The rank with which something is left to do; -1: none.
  int awaited() const {
    for (int peer = 0; peer < size(); ++peer) {
      if (!in_[peer].done() || !out_[peer].done()) return peer;
    }
    return -1;
  }

  // Copies what can be copied now.
  bool step() {
    bool moved = false;
    for (int peer = 0; peer < size(); ++peer) {
      moved |= out_[peer].advance([&](const char* data, size_t size) {
        const size_t count = layout_.ring(rank_, peer).write(data, size);
        if (count > 0) layout_.slot(peer).wake();
        return count;
      });
      moved |= in_[peer].advance([&](char* data, size_t size) {
        if (const size_t count = inbox_[peer].take(data, size)) return count;
        const size_t count = layout_.ring(peer, rank_).read(data, size);
        if (count > 0) layout_.slot(peer).wake();
        return count;
      });
    }
    return moved;
  }

  // A rank that cannot send takes what others send to it, though it does not want it yet: two ranks that send long
  // messages to each other before either receives would wait for ever.
  bool unblock() {
    if (std::all_of(out_.begin(), out_.end(), [](const Lane& lane) { return lane.done(); })) return false;
    bool moved = false;
    for (int peer = 0; peer < size(); ++peer) {
      if (peer == rank_ || !in_[peer].done()) continue;
      char piece[4096];
      while (const size_t count = layout_.ring(peer, rank_).read(piece, sizeof piece)) {
        inbox_[peer].bytes.append(piece, count);
        layout_.slot(peer).wake();
        moved = true;
      }
    }
    return moved;
  }

  void pause(Wait& wait) {
    if (++wait.spins < kSpins) return spin();
    const int64_t now = now_ns();
    const double seconds = wait.last_ns == 0 ? 0 : std::min((now - wait.last_ns) * 1e-9, kMostSecondsBetween);
    wait.last_ns = now;
    wait.seconds += seconds;
    throw_if_failed();
    if (unblock()) return;
    if (wait.seconds < kSecondsOfYields) {
      sched_yield();
      return;
    }
    own().seen_ns = now;
    own().waits_for = awaited() + 1;
    if (step_or_sleep() || check_ended() || (wait.seconds >= timeout_ && check_silent(wait, seconds))) wait = {};
  }

  // Like step(). When nothing can be copied, waits for the bell.
  bool step_or_sleep() {
    const uint32_t bell = own().bell;
    own().sleeps = 1;
    const bool moved = step();
    if (!moved && layout_.failed == 0) own().sleep(bell, kSecondsOfSleep);
    own().sleeps = 0;
    return moved;
  }

  void wake_all() noexcept {
    for (int peer = 0; peer < size(); ++peer) {
      if (peer != rank_) layout_.slot(peer).wake();
    }
  }

  void throw_if_failed() const {
    if (const int failed = layout_.failed) throw RankError(failed - 1, layout_.reason);
  }
  [[noreturn]] void give_up(int peer, const std::string& reason) {
    if (layout_.record(peer, "", reason.c_str())) wake_all();
    throw_if_failed();
    throw RankError(peer, reason);  // another rank is just writing its own
  }

  // These two throw unless a last step() finds what the rank sent before, and is true.
  bool check_ended() {
    for (int peer = 0; peer < size(); ++peer) {
      const bool awaits = !in_[peer].done() || !out_[peer].done();
      const bool ended = awaits && layout_.slot(peer).state == kEnded;
      if (!ended && !is_dead(peer)) continue;
      if (step()) return true;
      give_up(peer, ended ? "ended" : "ended unexpectedly");
    }
    return false;
  }
  bool check_silent(Wait& wait, double seconds) {
    const int peer = silent_rank();
    const RankSlot& slot = layout_.slot(peer);
    wait.seconds_blocked = slot.waits_for == 0 ? 0 : wait.seconds_blocked + seconds;
    const double limit = slot.state == kAbsent ? std::max(timeout_, kSecondsToStart) : timeout_;
    if (wait.seconds < limit) return false;
    if (step()) return true;
    if (slot.state == kAbsent) give_up(peer, "did not start within " + seconds_text(limit));
    if ((now_ns() - slot.seen_ns) * 1e-9 >= limit) give_up(peer, "was silent for " + seconds_text(limit));
    if (wait.seconds_blocked >= limit) give_up(peer, "waits in a circle of ranks that wait for each other");
    return false;
  }

  // Its process is gone, and it did not say that it would end.
  bool is_dead(int peer) {
    const RankSlot& slot = layout_.slot(peer);
    const int process = slot.process;
    if (process == 0 || process == getpid() || slot.state == kEnded) return false;
    if (processes_[peer] < 0) {
      processes_[peer] = static_cast<int>(syscall(SYS_pidfd_open, process, 0));
      if (processes_[peer] < 0) return errno == ESRCH && slot.state != kEnded;
    }
    pollfd poll_process = {processes_[peer], POLLIN, 0};
    return poll(&poll_process, 1, 0) == 1 && slot.state != kEnded;
  }

  // The rank that keeps this one waiting: the awaited one, or where that waits itself, the one that it waits for.
  int silent_rank() {
    int rank = awaited();
    for (int i = 0; i < size(); ++i) {
      const RankSlot& slot = layout_.slot(rank);
      const int next = slot.waits_for - 1;
      const bool is_alive = now_ns() - slot.seen_ns < kAliveNanoseconds;  // else it no longer waits: it is stopped
      if (next < 0 || next == rank_ || !is_alive) break;
      rank = next;
    }
    return rank;
  }

  const std::shared_ptr<ShmSegment> segment_;
  ShmSegment::Layout& layout_;
  const int rank_;
  const double timeout_;
  uint64_t bytes_sent_ = 0;
  int64_t looked_ns_ = 0;  // for ranks that ended
  std::vector<Lane> out_, in_;
  std::vector<Inbox> inbox_;
  std::vector<int> processes_;  // descriptors
};

}  // namespace

std::shared_ptr<Communicator> join_shm(std::shared_ptr<ShmSegment> segment, int rank, double timeout) {
  return std::make_shared<ShmCommunicator>(std::move(segment), rank, timeout);
}

std::vector<std::shared_ptr<Communicator>> shm_group(int size, double timeout) {
  const auto segment = ShmSegment::create(size);
  std::vector<std::shared_ptr<Communicator>> ranks;
  for (int rank = 0; rank < size; ++rank) ranks.push_back(join_shm(segment, rank, timeout));
  return ranks;
}

}  // namespace mixtral
