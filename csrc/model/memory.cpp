#include "memory.h"

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>
#include <malloc.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>

#include "../io/size.h"

namespace mixtral {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// The number after `key` in a file of "key value" lines, or the file's first word for an empty key; kUnlimited when
// there is no such file, key or number ("max").
int64_t read_number(const std::filesystem::path& path, const std::string& key) {
  std::ifstream file(path);
  std::string word;
  while (!key.empty() && word != key && file >> word) {
  }
  int64_t value;
  return file >> value ? value : kUnlimited;
}

int64_t system_memory() {
  const int64_t kib = read_number("/proc/meminfo", "MemAvailable:");
  return kib == kUnlimited ? kUnlimited : kib * 1024;
}

// The rest of `ulimit -v`.
int64_t address_space() {
  rlimit limit;
  const int64_t used_pages = read_number("/proc/self/statm", "");
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY || used_pages == kUnlimited)
    return kUnlimited;
  return static_cast<int64_t>(limit.rlim_cur) - used_pages * sysconf(_SC_PAGESIZE);
}

// The files of a control group, and the key of the pages that can be dropped.
struct GroupFiles {
  const char *limit, *used, *file_pages;
};
constexpr GroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file"};
constexpr GroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};

int64_t memory_of_group(const std::filesystem::path& folder, const GroupFiles& files) {
  const int64_t limit = read_number(folder / files.limit, ""), used = read_number(folder / files.used, "");
  const int64_t file_pages = read_number(folder / "memory.stat", files.file_pages);
  if (limit == kUnlimited || used == kUnlimited) return kUnlimited;
  return limit - used + (file_pages == kUnlimited ? 0 : file_pages);
}

}  // namespace

int64_t container_memory(const std::filesystem::path& root, const std::filesystem::path& groups) {
  const std::filesystem::path root_1 = root / "memory";
  int64_t least = std::min(memory_of_group(root, kVersion2), memory_of_group(root_1, kVersion1));
  std::ifstream file(groups);  // lines "0::/path" of version 2, "4:memory:/path" of version 1
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    if (controllers.empty()) least = std::min(least, memory_of_group(root.string() + path, kVersion2));
    if (controllers == "memory") least = std::min(least, memory_of_group(root_1.string() + path, kVersion1));
  }
  return least;
}

int64_t host_memory() { return std::max<int64_t>(0, std::min(system_memory(), container_memory())); }

int64_t available_memory(const std::string& device_name) {
  const c10::Device device(device_name);
  if (device.is_cpu()) return std::max<int64_t>(0, std::min(host_memory(), address_space()));
  at::globalContext().lazyInitDevice(device.type());  // the allocator knows no device before
  const auto index = device.has_index() ? device.index() : c10::DeviceIndex{0};
  auto* allocator = c10::getDeviceAllocator(device.type());
  const auto& stats = allocator->getDeviceStats(index);
  const auto total = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  const int64_t held = stats.reserved_bytes[total].current - stats.allocated_bytes[total].current;
  return static_cast<int64_t>(allocator->getMemoryInfo(index).first) + held;
}

std::string out_of_memory_text(const std::string& what, double bytes, const std::string& device, double available) {
  return what + ": needs " + bytes_text(bytes) + " on " + device.substr(0, device.find(':')) + ", " +
         bytes_text(available) + " available";
}

void release_free_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

void check_memory(const std::string& what, double bytes, const std::string& device) {
  const auto available = static_cast<double>(available_memory(device));
  if (bytes > available) throw OutOfMemory(out_of_memory_text(what, bytes, device, available));
}

}  // namespace mixtral
