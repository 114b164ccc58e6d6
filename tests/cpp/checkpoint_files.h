// Files for the loader tests: temporary folders and hand-written safetensors.
#pragma once

#include <ftw.h>
#include <gtest/gtest.h>
#include <malloc.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "io/load_error.h"

namespace mixtral::testing {

// A folder that is removed at the end of its scope.
class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "mixtral_test_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~TempFolder() {
    // Not std::filesystem::remove_all: libtorch.so exports an incomplete copy of it, which crashes.
    const auto remove = [](const char* path, const struct stat*, int, struct FTW*) { return std::remove(path); };
    ::nftw(path_.c_str(), remove, /*nopenfd=*/8, FTW_DEPTH | FTW_PHYS);
  }
  TempFolder(const TempFolder&) = delete;

  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// 8 bytes of little-endian length, the header, the data.
inline std::string safetensors(const std::string& header, const std::string& data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> (8 * i) & 0xff);
  return bytes + header + data;
}

// Runs `action` and expects a LoadError whose text contains `part`.
template <typename Action>
void expect_load_error(Action action, const std::string& part) {
  try {
    action();
    ADD_FAILURE() << "accepted; expected a LoadError with '" << part << "'";
  } catch (const LoadError& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

// Writes `bytes` to `path` and calls `load` once for each of the first `count` bits, with that bit of the file flipped.
template <typename Load>
void for_each_bit_flip(const std::filesystem::path& path, const std::string& bytes, size_t count, Load load) {
  write_file(path, bytes);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);  // in place: a new file each time is slow
  const auto put = [&](size_t at, int byte) {
    file.seekp(static_cast<std::streamoff>(at)).put(static_cast<char>(byte)).flush();
  };
  for (size_t i = 0; i < count; ++i) {
    put(i / 8, bytes[i / 8] ^ 1 << i % 8);
    load();
    put(i / 8, bytes[i / 8]);
  }
}

// Calls `load` on every prefix of the file, then on the file with each bit flipped: it loads or is a LoadError; any
// other exception fails the test, and a signal ends it. No prefix loads; a flip in one of the `data_bytes` of the
// tensors does.
template <typename Load>
void expect_damage_survived(const std::filesystem::path& path, const std::string& valid, size_t data_bytes, Load load) {
  int accepted = 0, rejected = 0;
  const auto count = [&] {
    try {
      load();
      ++accepted;
    } catch (const LoadError&) {
      ++rejected;
    }
  };
  write_file(path, valid);
  for (size_t n = valid.size(); n-- > 0;) {
    std::filesystem::resize_file(path, n);
    count();
  }
  EXPECT_EQ(accepted, 0);
  for_each_bit_flip(path, valid, 8 * valid.size(), count);
  EXPECT_GE(accepted, static_cast<int>(8 * data_bytes));
  EXPECT_GT(rejected, static_cast<int>(valid.size()));
}

// Peak resident memory of this process since it started or last called peak_memory_from_now(), in bytes.
inline int64_t peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::stoll(line.substr(6)) * 1024;
  }
  throw std::runtime_error("/proc/self/status has no VmHWM");
}

// Forgets earlier peaks, after free memory has gone back to the system. Returns the memory in use.
inline int64_t peak_memory_from_now() {
  ::malloc_trim(0);
  std::ofstream("/proc/self/clear_refs") << 5;
  return peak_memory();
}

}  // namespace mixtral::testing
