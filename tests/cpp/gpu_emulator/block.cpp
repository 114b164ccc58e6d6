#include "block.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <utility>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10, kSharedLimit = 227 << 10;

struct Thread {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  Index3 index;
  bool done = false;
  const char* waits_for = "the start";
  std::function<bool()> ready = [] { return true; };
  AsyncGroups products, copies;
  uint64_t exchanges = 0;
};

struct Warp {
  uint64_t arrived = 0;
  alignas(64) unsigned char values[2][32][64];  // in turns: a lane may be one exchange ahead
};

struct NamedBarrier {
  int arrived = 0;
  uint64_t phase = 0;
};

// What a launch's neighbours in the stream wait for.
struct Neighbours {
  bool previous_is_late = true, previous_is_done = false;
  size_t blocks_before_next;
};

class Block {
 public:
  Block(const Launch& launch, Index3 index, const std::function<void()>& kernel, std::mt19937_64& random,
        Neighbours& neighbours)
      : launch_(launch),
        index_(index),
        kernel_(kernel),
        random_(random),
        neighbours_(neighbours),
        threads_(launch.threads),
        warps_((launch.threads + 31) / 32),
        memory_(kSharedLimit + 2048),
        lateness_(4u << random() % 3 * 4),
        slow_warp_(random() % warps_.size()) {
    shared_ = memory_.data();
    while (reinterpret_cast<uintptr_t>(shared_) % 1024 != 0) ++shared_;
    std::fill(memory_.begin(), memory_.end(), static_cast<unsigned char>(0xFF));  // NaN in bf16, f32 and e4m3
  }

  void run();

  const Launch& launch_;
  const Index3 index_;
  const std::function<void()>& kernel_;
  std::mt19937_64& random_;
  Neighbours& neighbours_;
  bool begins_to_wait_ = false, lets_next_start_ = false;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> memory_;
  const unsigned lateness_;  // turns of threads until a copy lands: few, or as many as it takes all to wait
  const size_t slow_warp_;   // falls behind the others
  unsigned char* shared_;
  std::map<int, NamedBarrier> barriers_;
  std::vector<std::function<void()>> later_;
  size_t copies_begun_ = 0;
  std::string error_;
  Thread* current_ = nullptr;
  ucontext_t scheduler_;

 private:
  static void start(Thread& thread);
  void resume(Thread& thread);
  bool run_one_later();
  std::string what_threads_wait_for() const;
};

Block* block = nullptr;  // the one that runs

void thread_main() {
  try {
    block->kernel_();
    require(block->current_->products.committed.empty() && block->current_->products.open.empty(),
            "a thread ends with wgmma products it has not waited for");
  } catch (const std::exception& error) {
    block->error_ = error.what();
  }
  block->current_->done = true;
  swapcontext(&block->current_->context, &block->scheduler_);
}

void Block::start(Thread& thread) {
  thread.stack.reset(new unsigned char[kStackBytes]);
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, thread_main, 0);
}

void Block::resume(Thread& thread) {
  current_ = &thread;
  swapcontext(&scheduler_, &thread.context);
  current_ = nullptr;
  if (!error_.empty()) throw std::runtime_error("gpu emulator: " + error_);
}

bool Block::run_one_later() {
  if (later_.empty()) return false;
  std::swap(later_[random_() % later_.size()], later_.back());
  const auto work = std::move(later_.back());
  later_.pop_back();
  work();
  return true;
}

std::string Block::what_threads_wait_for() const {
  std::map<std::string, std::vector<unsigned>> waiting;
  for (const Thread& thread : threads_) {
    if (!thread.done) waiting[thread.waits_for].push_back(thread.index.x);
  }
  std::string text;
  for (const auto& [what, threads] : waiting) {
    text += " " + std::to_string(threads.size()) + " from thread " + std::to_string(threads.front()) + " wait for " +
            what + ";";
  }
  return text;
}

void Block::run() {
  std::vector<Thread*> order;
  for (Thread& thread : threads_) {
    thread.index = {static_cast<unsigned>(order.size()), 0, 0};
    start(thread);
    order.push_back(&thread);
  }
  while (!order.empty()) {
    std::shuffle(order.begin(), order.end(), random_);
    bool progress = false;
    for (Thread* thread : order) {
      if (!thread->ready()) continue;
      progress = true;
      if (thread->index.x / 32 == slow_warp_ && random_() % 16 != 0) continue;
      resume(*thread);
      if (random_() % lateness_ == 0) run_one_later();
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](Thread* thread) { return thread->done; }), order.end());
    if (!progress && !run_one_later()) throw std::runtime_error("gpu emulator: deadlock:" + what_threads_wait_for());
  }
  require(later_.empty(), "a block ends before its asynchronous copies have landed");
  for (const auto& [id, barrier] : barriers_)
    require(barrier.arrived == 0, "a block ends with arrivals at a named barrier that nobody waits for");
}

}  // namespace

void launch(const Launch& launch, const std::function<void()>& kernel) {
  require(launch.shared_bytes <= kSharedLimit, "more than 227 KiB of shared memory");
  std::mt19937_64 random(launch.seed);
  std::vector<Index3> blocks;
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; ++x) blocks.push_back({x, y, z});
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), random);
  Neighbours neighbours;
  neighbours.blocks_before_next = blocks.size();
  for (const Index3& index : blocks) {
    Block running(launch, index, kernel, random, neighbours);
    block = &running;
    running.run();
    const unsigned char* end = running.memory_.data() + running.memory_.size();
    require(std::all_of(static_cast<const unsigned char*>(running.shared_) + launch.shared_bytes, end,
                        [](unsigned char c) { return c == 0xFF; }),
            "a block wrote beyond its shared memory");
    block = nullptr;
  }
}

const Index3& thread_index() { return block->current_->index; }
const Index3& block_index() { return block->index_; }
const Index3& grid_size() { return block->launch_.grid; }
unsigned block_size() { return block->launch_.threads; }
unsigned char* shared_memory() { return block->shared_; }
size_t shared_bytes() { return block->launch_.shared_bytes; }

void wait_until(const char* what, const std::function<bool()>& ready) {
  if (ready() && flip()) return;
  Thread& thread = *block->current_;
  thread.waits_for = what;
  thread.ready = ready;
  swapcontext(&thread.context, &block->scheduler_);
}

void wait_for_previous_kernel() {
  block->begins_to_wait_ = true;
  Neighbours& neighbours = block->neighbours_;
  if (std::exchange(neighbours.previous_is_late, false)) {
    run_later([&neighbours, &launch = block->launch_] {
      launch.previous_kernel();
      neighbours.previous_is_done = true;
    });
  }
  wait_until("the kernel before", [&neighbours, &launch = block->launch_] {
    return neighbours.previous_is_done && launch.previous_may_end();
  });
}

void let_next_kernel_start() {
  if (block->lets_next_start_) return;
  block->lets_next_start_ = true;
  require(!block->launch_.waits_first || (block->begins_to_wait_ && block->neighbours_.previous_is_done),
          "a block lets the next kernel start before it has waited for the kernel before");
  if (--block->neighbours_.blocks_before_next == 0) block->launch_.next_kernel();
}

void run_later(std::function<void()> work) { block->later_.push_back(std::move(work)); }

void run_copy(std::function<void()> work) {
  ++block->copies_begun_;
  run_later(std::move(work));
}
size_t copies_begun() { return block->copies_begun_; }

bool flip() { return block->random_() % 2 == 0; }

const unsigned char* exchange_in_warp(const void* value, size_t bytes) {
  Thread& thread = *block->current_;
  Warp& warp = block->warps_[thread.index.x / 32];
  const uint64_t number = thread.exchanges++;
  auto& values = warp.values[number % 2];
  if (bytes > 0) std::memcpy(values[thread.index.x % 32], value, bytes);
  ++warp.arrived;
  wait_until("the other lanes of the warp", [&warp, number] { return warp.arrived >= 32 * (number + 1); });
  return &values[0][0];
}

void named_barrier(int id, int threads, bool arrive_only) {
  require(id >= 0 && id < 16 && threads % 32 == 0, "barriers are 0 to 15 and count whole warps");
  NamedBarrier& barrier = block->barriers_[id];
  const uint64_t phase = barrier.phase;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
  if (!arrive_only) wait_until("a named barrier", [&barrier, phase] { return barrier.phase != phase; });
}

void AsyncGroups::commit() {
  committed.push_back(std::move(open));
  open.clear();
}

void AsyncGroups::wait(size_t pending) {
  while (committed.size() > pending) {
    for (const auto& work : committed.front()) work();
    committed.erase(committed.begin());
  }
}

AsyncGroups& products() { return block->current_->products; }
AsyncGroups& copies() { return block->current_->copies; }

}  // namespace emulator
