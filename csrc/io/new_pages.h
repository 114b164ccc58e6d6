// Pages of memory that is about to be written for the first time. No torch in here.
#pragma once

#include <cstdint>
#include <functional>

#include "mapped_file.h"

namespace mixtral {

// Brings the pages of the memory into being by one call, instead of a fault for each when it is written. Where the
// system cannot do that, nothing changes.
void bring_into_being(const PageRange& range);

// Brings large pages into being as long as the system has them at hand. One that is at hand costs less than the small
// pages in its place. Others cost many times as much: the system has to move other pages out of the way first, or, in a
// virtual machine, the host has taken the memory back. Nothing tells that beforehand, so each is timed.
class LargePages {
 public:
  // Calls its argument on some threads at the same time, and returns when all have ended.
  using OnThreads = std::function<void(const std::function<void()>&)>;
  // Brings one page into being; seconds of the processor that it took. Any thread.
  using TimedPage = std::function<double(const PageRange& page)>;

  explicit LargePages(TimedPage timed_page = nullptr);
  // All of the memory that whole large pages cover, on those threads. When one took long, the rest, and the memory of
  // the next calls up to a GiB, gets small pages, when it is written.
  void bring(const PageRange& range, const OnThreads& on_threads);
  // On this thread alone.
  void bring(const PageRange& range) {
    bring(range, [](const std::function<void()>& body) { body(); });
  }

 private:
  const TimedPage timed_page_;
  uint64_t small_bytes_ = 0;  // that still get small pages
};

}  // namespace mixtral
