#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "load_error.h"

namespace mixtral {
namespace {

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
  if (fd_ >= 0) ::close(fd_);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), size_(other.size_) {}

void File::read(uint64_t offset, void* out, uint64_t bytes) const {
  constexpr uint64_t kMaxCall = 1u << 30;  // Linux returns at most about 2 GiB from one call
  auto* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t n = ::pread(fd_, to, std::min(bytes, kMaxCall), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw LoadError(path_, "", std::string("cannot be read: ") + std::strerror(errno));
    if (n == 0) throw LoadError(path_, "", "ends at byte " + std::to_string(offset) + ", where data was expected");
    to += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<uint64_t>(n);
  }
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
