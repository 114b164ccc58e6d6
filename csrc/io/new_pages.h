// Pages of memory that is about to be written for the first time. No torch in here.
#pragma once

#include <cstdint>
#include <functional>

#include "mapped_file.h"

namespace mixtral {

// Brings the pages of the memory into being by one call, instead of a fault for each when it is written. Where the
// system cannot do that, nothing changes.
void bring_into_being(const PageRange& range);

// Asks the system for large pages as long as it has them at hand. One that is at hand costs less than the small pages
// in its place. Others cost many times as much: the system may have to move other pages out of the way first, or, in a
// virtual machine, the host may have taken the memory back. Nothing tells that beforehand: it is measured.
class LargePages {
 public:
  // Brings one page into being; seconds of the processor that it took.
  using TimedPage = std::function<double(const PageRange& page)>;

  explicit LargePages(TimedPage timed_page = nullptr);
  // For memory that will be written next, by any thread. If its first large page takes long, the rest of it and of the
  // next GiB get small ones. Returns whether large pages were asked for.
  bool ask_for(const PageRange& range);

 private:
  const TimedPage timed_page_;
  uint64_t small_bytes_ = 0;  // that still get small pages
};

}  // namespace mixtral
