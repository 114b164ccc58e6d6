// What lies in the memory that ranks share. It begins as zeros, and every process of a group is the same program.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>

#include "shm.h"

namespace mixtral {

constexpr size_t kRingBytes = size_t{1} << 18;
// Copied at a time, so that the reader of a long message begins before its writer is done.
constexpr size_t kPieceBytes = size_t{1} << 15;

enum RankState : int32_t { kAbsent = 0, kRunning = 1, kEnded = 2 };

// What one rank shows to the others. The order of all these atomics matters: none is relaxed.
struct alignas(64) RankSlot {
  std::atomic<int32_t> state;
  std::atomic<int32_t> process;
  std::atomic<int32_t> waits_for;  // a rank + 1; 0: none
  std::atomic<int64_t> seen_ns;    // when it was last known to run, by the clock of the host
  alignas(64) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> sleeps;  // 1: wants the bell

  // Unless the bell has rung since it was `heard`; at most for so long.
  void sleep(uint32_t heard, double seconds) {
    const timespec time = {0, static_cast<long>(seconds * 1e9)};
    syscall(SYS_futex, &bell, FUTEX_WAIT, heard, &time, nullptr, 0);
  }
  void wake() {
    if (sleeps == 0) return;
    ++bell;
    syscall(SYS_futex, &bell, FUTEX_WAKE, 1, nullptr, nullptr, 0);
  }
};

// One writer, one reader. The counts never wrap.
struct Ring {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> taken;
  alignas(64) char bytes[kRingBytes];

  // These copy what they can at once, and return how much it was.
  size_t write(const char* data, size_t count) {
    const uint64_t begin = written;
    count = std::min({count, kPieceBytes, kRingBytes - static_cast<size_t>(begin - taken)});
    if (count == 0) return 0;
    const size_t at = begin % kRingBytes, first = std::min(count, kRingBytes - at);
    std::memcpy(bytes + at, data, first);
    std::memcpy(bytes, data + first, count - first);
    written = begin + count;
    return count;
  }
  size_t read(char* data, size_t count) {
    const uint64_t begin = taken;
    count = std::min({count, kPieceBytes, static_cast<size_t>(written - begin)});
    if (count == 0) return 0;
    const size_t at = begin % kRingBytes, first = std::min(count, kRingBytes - at);
    std::memcpy(data, bytes + at, first);
    std::memcpy(data + first, bytes, count - first);
    taken = begin + count;
    return count;
  }
};

// Followed by the slots, and a ring for each pair.
struct alignas(64) ShmSegment::Layout {
  uint64_t bytes;  // of everything
  int32_t ranks;
  std::atomic<int32_t> is_claimed;  // somebody writes the reason
  std::atomic<int32_t> failed;      // the rank that failed first + 1; 0: none
  char reason[1024];

  static size_t size_of(int ranks) { return sizeof(Layout) + ranks * (sizeof(RankSlot) + ranks * sizeof(Ring)); }
  RankSlot& slot(int rank) { return reinterpret_cast<RankSlot*>(this + 1)[rank]; }
  Ring& ring(int from, int to) { return reinterpret_cast<Ring*>(&slot(ranks))[from * ranks + to]; }

  // Why the group fails. The first reason is the cause, and all others follow from it: false for those.
  bool record(int rank, const char* prefix, const char* text) noexcept {
    if (is_claimed.exchange(1) != 0) return false;
    std::snprintf(reason, sizeof reason, "%s%s", prefix, text);
    failed = rank + 1;
    return true;
  }
};

}  // namespace mixtral
