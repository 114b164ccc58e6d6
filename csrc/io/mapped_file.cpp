#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "load_error.h"

namespace mixtral {
namespace {

uint64_t page_bytes() {
  static const auto bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

MappedFile::MappedFile(const File& file) {
  struct stat status;
  if (::fstat(file.descriptor(), &status) != 0 || static_cast<uint64_t>(status.st_size) != file.size())
    throw LoadError(file.path(), "", "has changed since it was opened");
  // Without MAP_NORESERVE the system would want memory for a copy of every page.
  void* data = ::mmap(nullptr, file.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.descriptor(), 0);
  if (data == MAP_FAILED) throw LoadError(file.path(), "", std::string("cannot be mapped: ") + std::strerror(errno));
  data_ = static_cast<char*>(data);
  bytes_ = file.size();
  shows_residency_ = status.st_uid == ::geteuid() || ::faccessat(AT_FDCWD, file.path().c_str(), W_OK, AT_EACCESS) == 0;
}

MappedFile::~MappedFile() { ::munmap(data_, bytes_); }

PageRange pages_around(const void* begin, uint64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = address / page_bytes() * page_bytes();
  const uintptr_t end = (address + bytes + page_bytes() - 1) / page_bytes() * page_bytes();
  return {reinterpret_cast<char*>(first), end - first};
}

std::vector<PageRange> missing_pages(const PageRange& range) {
  std::vector<unsigned char> resident(range.bytes / page_bytes());
  std::vector<PageRange> missing;
  if (resident.empty() || ::mincore(range.begin, range.bytes, resident.data()) != 0) return missing;
  bool before = true;  // whether the page before is in memory
  for (size_t page = 0; page < resident.size(); ++page) {
    const bool here = resident[page] & 1;
    if (!here && before) missing.push_back({range.begin + page * page_bytes(), 0});
    if (!here) missing.back().bytes += page_bytes();
    before = here;
  }
  return missing;
}

void read_alone(const PageRange& range) {
  if (range.bytes > 0) ::madvise(range.begin, range.bytes, MADV_RANDOM);
}

// Linux reads of each request no more than the read-ahead of the disk, which is this much unless it was raised.
void read_ahead(const PageRange& range) {
  constexpr uint64_t kPiece = 128 << 10;
  for (uint64_t at = 0; at < range.bytes; at += kPiece)
    ::madvise(range.begin + at, std::min(kPiece, range.bytes - at), MADV_WILLNEED);
}

void touch_pages(const char* begin, const char* end) {
  for (; begin < end; begin += page_bytes()) [[maybe_unused]] const volatile char touched = *begin;
}

bool lock_pages(const PageRange& range) {
  constexpr uint64_t kPiece = 16 << 20;  // asked for at a time
  // Plain mlock would make a copy of every page of a private mapping that may be written to.
  if (range.bytes > 0 && ::mlock2(range.begin, range.bytes, MLOCK_ONFAULT) != 0) return false;
  for (uint64_t at = 0; at < range.bytes; at += page_bytes()) {
    if (at % kPiece == 0) read_ahead({range.begin + at, std::min(kPiece, range.bytes - at)});
    [[maybe_unused]] const volatile char touched = range.begin[at];
  }
  return true;
}

bool may_lock(uint64_t bytes) {
  if (bytes == 0) return true;
  void* const nothing = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (nothing == MAP_FAILED) return false;
  const bool may = ::mlock2(nothing, bytes, MLOCK_ONFAULT) == 0;
  const int error = errno;
  ::munmap(nothing, bytes);
  errno = error;
  return may;
}

}  // namespace mixtral
