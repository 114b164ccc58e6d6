#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>
#include <utility>

#include "load_error.h"

namespace mixtral {
namespace {

// Of addresses, places and sizes of direct reads: all that disks ask for. Shorter reads are not worth the way around.
constexpr uint64_t kDirectAlignment = 4096, kLeastDirect = 64 << 10, kDirectPiece = 4 << 20;

// Of kDirectPiece bytes, for this thread.
char* direct_buffer() {
  thread_local const std::unique_ptr<void, void (*)(void*)> buffer(std::aligned_alloc(kDirectAlignment, kDirectPiece),
                                                                   std::free);
  if (!buffer) throw std::bad_alloc();
  return static_cast<char*>(buffer.get());
}

// Why open() failed. The cache of a hub holds links, which lead nowhere while a download is not complete.
std::string reason(const std::filesystem::path& path, int error) {
  std::error_code ignored;
  if (error == ENOENT && std::filesystem::is_symlink(path, ignored))
    return "points to a file that is not there: the download is not complete, start it again";
  return std::string("cannot be opened: ") + std::strerror(error);
}

}  // namespace

bool file_exists(const std::filesystem::path& path) {
  std::error_code error;
  const auto type = std::filesystem::symlink_status(path, error).type();
  if (type == std::filesystem::file_type::not_found) return false;
  if (error) throw LoadError(path.string(), "", "cannot be looked for: " + error.message());
  return true;
}

File::File(const std::filesystem::path& path) : path_(path.string()) {
  fd_ = ::open(path_.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);  // O_NONBLOCK: opening a FIFO must not wait
  if (fd_ < 0) throw LoadError(path_, "", reason(path, errno));
  struct stat status;
  if (::fstat(fd_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(fd_);
    throw LoadError(path_, "", "is not a regular file");
  }
  size_ = static_cast<uint64_t>(status.st_size);
}

File::~File() {
  for (const int fd : {fd_, direct_fd_})
    if (fd >= 0) ::close(fd);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      direct_fd_(std::exchange(other.direct_fd_, -1)),
      size_(other.size_) {}

void File::read(uint64_t offset, void* out, uint64_t bytes) const {
  constexpr uint64_t kMaxCall = 1u << 30;  // Linux returns at most about 2 GiB from one call
  auto* to = static_cast<char*>(out);
  if (reads_directly() && bytes >= kLeastDirect) return read_direct(offset, to, bytes);
  while (bytes > 0) {
    const uint64_t n = read_some(fd_, offset, to, std::min(bytes, kMaxCall));
    to += n;
    offset += n;
    bytes -= n;
  }
}

// At least one byte.
uint64_t File::read_some(int fd, uint64_t offset, void* out, uint64_t bytes) const {
  ssize_t n;
  do {
    n = ::pread(fd, out, bytes, static_cast<off_t>(offset));
  } while (n < 0 && errno == EINTR);
  if (n < 0) throw LoadError(path_, "", std::string("cannot be read: ") + std::strerror(errno));
  if (n == 0) throw LoadError(path_, "", "ends at byte " + std::to_string(offset) + ", where data was expected");
  return static_cast<uint64_t>(n);
}

// Whole blocks around the bytes come into an aligned buffer, of which the bytes are copied.
void File::read_direct(uint64_t offset, char* to, uint64_t bytes) const {
  char* const buffer = direct_buffer();
  while (bytes > 0) {
    const uint64_t begin = offset / kDirectAlignment * kDirectAlignment, skipped = offset - begin;
    const uint64_t blocks = (skipped + bytes + kDirectAlignment - 1) / kDirectAlignment;
    const uint64_t came = read_some(direct_fd_, begin, buffer, std::min(blocks * kDirectAlignment, kDirectPiece));
    if (came <= skipped) {
      throw LoadError(path_, "", "ends at byte " + std::to_string(begin + came) + ", where data was expected");
    }
    const uint64_t n = std::min(came - skipped, bytes);
    std::memcpy(to, buffer + skipped, n);
    to += n;
    offset += n;
    bytes -= n;
  }
}

bool File::read_directly() {
  // The same file, even if its name is another one's by now.
  const std::string same = "/proc/self/fd/" + std::to_string(fd_);
  direct_fd_ = ::open(same.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  // Some file systems refuse no sooner than at the first read.
  if (direct_fd_ >= 0 && ::pread(direct_fd_, direct_buffer(), kDirectAlignment, 0) < 0)
    ::close(std::exchange(direct_fd_, -1));
  return reads_directly();
}

std::string read_text(const std::filesystem::path& path, uint64_t max_bytes) {
  const File file(path);
  if (file.size() > max_bytes) {
    throw LoadError(file.path(), "",
                    "must have at most " + std::to_string(max_bytes) + " bytes, got " + std::to_string(file.size()));
  }
  std::string text(file.size(), '\0');
  file.read(0, text.data(), text.size());
  return text;
}

}  // namespace mixtral
