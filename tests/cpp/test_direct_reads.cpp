// Reads past the memory of the system: the same bytes wherever they lie, and none of them kept.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <random>
#include <string>

#include "checkpoint_files.h"
#include "io/file.h"
#include "io/mapped_file.h"

namespace mixtral {
namespace {

using testing::expect_load_error;
using testing::TempFolder;
using testing::write_file;

std::string random_bytes(size_t count) {
  std::mt19937 random(1);
  std::string bytes(count, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

uint64_t bytes_in_memory(const File& file) {
  const MappedFile mapped(file);
  const PageRange all = pages_around(mapped.data(), file.size());
  uint64_t in_memory = all.bytes;
  for (const PageRange& range : missing_pages(all)) in_memory -= range.bytes;
  return in_memory;
}

TEST(DirectReads, GiveTheBytesOfEveryPlaceAndSize) {
  const TempFolder folder;
  constexpr uint64_t kSize = (9 << 20) + 1234;  // more than two pieces, and a part of a block
  const std::string bytes = random_bytes(kSize);
  write_file(folder / "file", bytes);
  File file(folder / "file");
  if (!file.read_directly()) GTEST_SKIP() << "the file system of the temporary folder cannot read directly";
  EXPECT_TRUE(file.reads_directly());
  const auto expect_bytes = [&](uint64_t offset, uint64_t count) {
    std::string out(count + 2, '?');
    file.read(offset, out.data() + 1, count);
    EXPECT_EQ(out.substr(1, count), bytes.substr(offset, count)) << offset << " " << count;
    EXPECT_EQ(out.front(), '?');
    EXPECT_EQ(out.back(), '?');
  };
  for (const uint64_t offset : {0, 1, 4095, 4096, 4097, 5 << 20})
    for (const uint64_t count : {0, 1, 65535, 65536, 100'000, 4 << 20}) expect_bytes(offset, count);
  expect_bytes(0, kSize);
  expect_bytes(3, kSize - 3);
  expect_bytes(kSize - 65536, 65536);
  std::string out(100'000, ' ');
  expect_load_error([&] { file.read(kSize - 99'999, out.data(), 100'000); }, "ends at byte " + std::to_string(kSize));
  expect_load_error([&] { file.read(kSize + 9000, out.data(), 100'000); }, "where data was expected");
}

TEST(DirectReads, LeaveNothingInTheMemoryOfTheSystem) {
  const TempFolder folder;
  write_file(folder / "file", random_bytes(8 << 20));
  File file(folder / "file");
  ::fsync(file.descriptor());
  ::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
  if (bytes_in_memory(file) > 0 || !file.read_directly())
    GTEST_SKIP() << "the file system of the temporary folder keeps files in memory";
  std::string out(8 << 20, ' ');
  file.read(0, out.data(), out.size());
  EXPECT_EQ(bytes_in_memory(file), 0);
  File buffered(folder / "file");
  buffered.read(0, out.data(), out.size());
  EXPECT_EQ(bytes_in_memory(file), 8 << 20);
}

TEST(DirectReads, StayWithTheFileThatWasOpened) {
  const TempFolder folder;
  const std::string bytes = random_bytes(1 << 20);
  write_file(folder / "file", bytes);
  File file(folder / "file");
  std::filesystem::rename(folder / "file", folder / "old");
  write_file(folder / "file", std::string(1 << 20, 'n'));
  file.read_directly();
  std::string out(1 << 20, ' ');
  file.read(0, out.data(), out.size());
  EXPECT_EQ(out, bytes);
}

TEST(DirectReads, AreRefusedByFileSystemsWithoutThem) {
  File file("/proc/self/status");
  EXPECT_FALSE(file.read_directly());
  EXPECT_FALSE(file.reads_directly());
  char letters[4];
  file.read(0, letters, 4);
  EXPECT_EQ(std::string(letters, 4), "Name");
}

}  // namespace
}  // namespace mixtral
