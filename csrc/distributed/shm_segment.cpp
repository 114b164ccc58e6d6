#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <system_error>

#include "shm_layout.h"

namespace mixtral {

ShmSegment::ShmSegment(int descriptor, size_t bytes) : descriptor_(descriptor), bytes_(bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    ::close(descriptor);
    throw std::system_error(error, std::generic_category(), "cannot map the memory that ranks share");
  }
  layout_ = static_cast<Layout*>(memory);
}

ShmSegment::~ShmSegment() {
  munmap(layout_, bytes_);
  ::close(descriptor_);
}

std::shared_ptr<ShmSegment> ShmSegment::create(int ranks) {
  const size_t bytes = Layout::size_of(ranks);
  const int descriptor = memfd_create("mixtral-ranks", MFD_CLOEXEC);
  if (descriptor < 0 || ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    if (descriptor >= 0) ::close(descriptor);
    throw std::system_error(error, std::generic_category(), "cannot make the memory that ranks share");
  }
  std::shared_ptr<ShmSegment> segment(new ShmSegment(descriptor, bytes));
  segment->layout().ranks = ranks;
  segment->layout().bytes = bytes;
  return segment;
}

std::shared_ptr<ShmSegment> ShmSegment::open(int descriptor) {
  struct stat status = {};
  const bool is_segment = fstat(descriptor, &status) == 0 && status.st_size >= static_cast<off_t>(sizeof(Layout));
  if (!is_segment) {
    if (descriptor >= 0) ::close(descriptor);
    throw std::runtime_error("the memory that ranks share is not there: another program has started this one");
  }
  const size_t bytes = static_cast<size_t>(status.st_size);
  std::shared_ptr<ShmSegment> segment(new ShmSegment(descriptor, bytes));
  const Layout& layout = segment->layout();
  if (layout.bytes != bytes || layout.ranks < 1 || Layout::size_of(layout.ranks) != bytes)
    throw std::runtime_error("the memory that ranks share is of another build of this program");
  return segment;
}

int ShmSegment::ranks() const { return layout_->ranks; }

void ShmSegment::expect(int rank, int process) { layout_->slot(rank).process = process; }

}  // namespace mixtral
