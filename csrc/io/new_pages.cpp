#include "new_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <ctime>
#include <utility>

namespace mixtral {
namespace {

constexpr uint64_t kLargePage = 2 << 20;  // of x86-64, and of ARM with small pages of 4 KiB
constexpr uint64_t kSmallStretch = 1 << 30;
// Clearing 2 MiB takes 0.2 to 0.5 ms, and as many small pages take up to 1.6; large pages not at hand took 5 to 10.
constexpr double kMostSeconds = 1.5e-3;

void choose_pages([[maybe_unused]] const PageRange& range, [[maybe_unused]] bool large) {
#ifdef MADV_HUGEPAGE
  ::madvise(range.begin, range.bytes, large ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
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

void LargePages::bring(const PageRange& range, const OnThreads& on_threads) {
  const uint64_t small = std::min(small_bytes_, range.bytes);
  small_bytes_ -= small;
  choose_pages(range, small == 0);
  const uint64_t skipped = -reinterpret_cast<uintptr_t>(range.begin) % kLargePage;
  if (small > 0 || range.bytes < skipped + kLargePage) return;
  const uint64_t pages = (range.bytes - skipped) / kLargePage;
  std::atomic<uint64_t> next = 0;
  std::atomic<bool> slow = false;
  on_threads([&] {
    for (uint64_t page = 0; !slow && (page = next++) < pages;)
      if (timed_page_({range.begin + skipped + page * kLargePage, kLargePage}) > kMostSeconds) slow = true;
  });
  if (!slow) return;
  small_bytes_ = kSmallStretch;
  const uint64_t done = skipped + std::min<uint64_t>(next, pages) * kLargePage;
  choose_pages({range.begin + done, range.bytes - done}, false);
}

}  // namespace mixtral
