// A file in the address space. Its bytes come from the disk when they are first touched, and the system may drop them
// again when memory is short. No torch in here.
#pragma once

#include <cstdint>
#include <vector>

#include "file.h"

namespace mixtral {

// Copy on write: who writes to the memory changes neither the file nor what other processes see. Another process must
// not cut the file short meanwhile: the system then ends this one with SIGBUS at the next touch of what is gone.
class MappedFile {
 public:
  // Throws LoadError when the file cannot be mapped, or has another size than when it was opened.
  explicit MappedFile(const File& file);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;

  char* data() const { return data_; }
  // Whether missing_pages() can tell: the system hides it of files that this user may not write.
  bool shows_residency() const { return shows_residency_; }

 private:
  char* data_ = nullptr;
  uint64_t bytes_ = 0;
  bool shows_residency_ = false;
};

// Memory that begins and ends with a page.
struct PageRange {
  char* begin;
  uint64_t bytes;
};

PageRange pages_around(const void* begin, uint64_t bytes);
// The runs of pages that are neither in memory nor changed by this process; nothing for memory that is not mapped.
std::vector<PageRange> missing_pages(const PageRange& range);
// A page that is touched brings no others along from now on: the system reads up to megabytes around it by itself.
void read_alone(const PageRange& range);
// Asks the system to read the pages, and returns when that has begun. What cannot be asked for is read when it is
// touched, so there is no error.
void read_ahead(const PageRange& range);

// Says to the system that the pages from `begin` to `end` are in use. Waits for those that are not in memory.
void touch_pages(const char* begin, const char* end);

// Brings the pages into memory, where they stay until the memory is given back. Pages of a mapped file stay those of
// the file. False, with errno: the system does not let this process, or lacks the memory.
bool lock_pages(const PageRange& range);
// Whether the system lets this process lock so many bytes more; errno says why not.
bool may_lock(uint64_t bytes);

}  // namespace mixtral
