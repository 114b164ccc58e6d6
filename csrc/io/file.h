// A regular file, opened for reading. Every loader looks for files and reads them through these.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace mixtral {

// Whether `path` names anything, be it a link that leads nowhere: to open that says what is wrong. Throws LoadError
// where it cannot be told. (std::filesystem::exists follows links and throws for a loop of them.)
bool file_exists(const std::filesystem::path& path);

class File {
 public:
  // Follows symbolic links. Throws LoadError when `path` cannot be opened or is no regular file; never blocks.
  explicit File(const std::filesystem::path& path);
  ~File();
  File(File&& other) noexcept;
  File(const File&) = delete;

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }  // when it was opened
  int descriptor() const { return fd_; }

  // Reads `bytes` bytes at `offset`. pread, not mmap: a file cut short meanwhile is a LoadError, never a SIGBUS.
  void read(uint64_t offset, void* out, uint64_t bytes) const;

  // From now on large reads go past the memory of the system (O_DIRECT), which then keeps no second copy. False, and
  // nothing changes: the file system cannot do that.
  bool read_directly();
  bool reads_directly() const { return direct_fd_ >= 0; }

 private:
  void read_direct(uint64_t offset, char* to, uint64_t bytes) const;
  uint64_t read_some(int fd, uint64_t offset, void* out, uint64_t bytes) const;

  std::string path_;
  int fd_ = -1, direct_fd_ = -1;
  uint64_t size_ = 0;
};

// The whole file. Throws LoadError when it is larger than `max_bytes`.
std::string read_text(const std::filesystem::path& path, uint64_t max_bytes);

}  // namespace mixtral
