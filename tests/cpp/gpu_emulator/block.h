// A GPU block on the CPU: every thread of it is a fiber. Threads run in a random order and switch only where they wait,
// so a seed is a schedule; one warp falls behind. Asynchronous copies land at a random later time, at the
// latest when every thread waits.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

struct Launch {
  Index3 grid{1, 1, 1};
  unsigned threads = 32;
  size_t shared_bytes = 0;   // dynamic shared memory; whatever lies beyond it and 227 KiB is out of bounds
  uint64_t seed = 0;         // of the schedule
  bool waits_first = false;  // error: a block lets the next kernel start, and has not waited for the kernel before
  // Programmatic dependent launch: what the kernel before does last of all, at a random time after a thread has begun
  // to wait for it; what the kernel behind does first of all, as soon as every block has let it start.
  std::function<void()> previous_kernel = [] {}, next_kernel = [] {};
  std::function<bool()> previous_may_end = [] { return true; };  // else who waits for it goes on waiting
};

// Runs `kernel` in every thread of every block, one block after the other in a random order. Throws std::runtime_error
// when the threads of a block wait for each other for ever, and where an instruction is used against its rules.
void launch(const Launch& launch, const std::function<void()>& kernel);

// ---- for the instructions, called from a thread

const Index3& thread_index();
const Index3& block_index();
const Index3& grid_size();
unsigned block_size();
unsigned char* shared_memory();  // 1024-byte aligned, NaN patterns at the start of a block
size_t shared_bytes();

// Waits until ready() holds; `what` names it in the message of a deadlock.
void wait_until(const char* what, const std::function<bool()>& ready);

// griddepcontrol.wait, griddepcontrol.launch_dependents
void wait_for_previous_kernel();
void let_next_kernel_start();

// Runs `work` at a random time from now on, not in a thread.
void run_later(std::function<void()> work);

// The same for a copy of TMA; how many of them the block has begun.
void run_copy(std::function<void()> work);
size_t copies_begun();

// A coin of the schedule.
bool flip();

// Every lane gives `bytes` (at most 64); returns those of lanes 0 to 31, 64 bytes apart, valid until the next call.
const unsigned char* exchange_in_warp(const void* value, size_t bytes);

// bar.sync (arrive_only: bar.arrive): threads arrive at barrier `id` until `threads` have.
void named_barrier(int id, int threads, bool arrive_only);

// What a thread has issued and not waited for: committed groups of wgmma products (or cp.async copies), oldest first.
struct AsyncGroups {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> committed;
  void commit();
  void wait(size_t pending);
};
AsyncGroups& products();
AsyncGroups& copies();

inline void require(bool holds, const char* rule) {
  if (!holds) throw std::runtime_error(rule);
}

}  // namespace emulator
