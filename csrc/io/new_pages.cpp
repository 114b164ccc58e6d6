#include "new_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <ctime>
#include <utility>

namespace mixtral {
namespace {

constexpr uint64_t kLargePage = 2 << 20;  // of x86-64, and of ARM with pages of 4 KiB
constexpr uint64_t kSmallStretch = 1 << 30;
// Clearing 2 MiB takes some 0.2 ms, and so many small pages take up to 1.6; large pages not at hand took 8.
constexpr double kMostSeconds = 1e-3;

void ask_system(const PageRange& range) {
#ifdef MADV_HUGEPAGE
  ::madvise(range.begin, range.bytes, MADV_HUGEPAGE);
#endif
}

// Of this thread alone: another one that takes its core must not count.
double processor_seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double time_page(const PageRange& page) {
  const double start = processor_seconds();
  bring_into_being(page);
  return processor_seconds() - start;
}

}  // namespace

void bring_into_being([[maybe_unused]] const PageRange& range) {
#ifdef MADV_POPULATE_WRITE
  ::madvise(range.begin, range.bytes, MADV_POPULATE_WRITE);
#endif
}

LargePages::LargePages(TimedPage timed_page) : timed_page_(timed_page ? std::move(timed_page) : time_page) {}

bool LargePages::ask_for(const PageRange& range) {
  const uint64_t small = std::min(small_bytes_, range.bytes);
  small_bytes_ -= small;
  const uint64_t skipped = -reinterpret_cast<uintptr_t>(range.begin) % kLargePage;
  if (small > 0 || range.bytes < skipped + kLargePage) return false;
  const PageRange first{range.begin + skipped, kLargePage};
  ask_system(first);
  if (timed_page_(first) <= kMostSeconds) {
    ask_system(range);
    return true;
  }
  small_bytes_ = kSmallStretch;
  return false;
}

}  // namespace mixtral
