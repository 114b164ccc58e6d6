#include "disk_bandwidth.h"

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace mixtral {
namespace {

constexpr uint64_t kPiece = 4 << 20, kLeastBytes = 16 << 20, kMostBytes = 256 << 20;

// Bytes of the file that a first part of at most kMostBytes has.
uint64_t read_pieces(int descriptor) {
  const std::unique_ptr<void, void (*)(void*)> buffer(std::aligned_alloc(4096, kPiece), std::free);
  uint64_t bytes = 0;
  while (buffer && bytes < kMostBytes) {
    const ssize_t count = ::pread(descriptor, buffer.get(), kPiece, static_cast<off_t>(bytes));
    if (count <= 0) break;
    bytes += static_cast<uint64_t>(count);
    if (static_cast<uint64_t>(count) < kPiece) break;  // the end; what follows would not be aligned
  }
  return bytes;
}

}  // namespace

double disk_bandwidth(const std::filesystem::path& file) {
#ifdef O_DIRECT
  const int descriptor = ::open(file.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (descriptor < 0) return 0;
  const auto start = std::chrono::steady_clock::now();
  const uint64_t bytes = read_pieces(descriptor);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  ::close(descriptor);
  if (bytes >= kLeastBytes) return static_cast<double>(bytes) / seconds.count();
#endif
  return 0;
}

}  // namespace mixtral
