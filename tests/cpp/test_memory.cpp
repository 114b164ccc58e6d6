// Free memory as the system and a container's limits tell it.
#include <gtest/gtest.h>

#include <limits>

#include "checkpoint_files.h"
#include "model/memory.h"

namespace mixtral {
namespace {

using testing::TempFolder;
using testing::write_file;

TEST(Memory, WhatDoesNotFitIsAnErrorWithNumbers) {
  EXPECT_GT(available_memory("cpu"), 0);
  EXPECT_NO_THROW(check_memory("a page", 4096, "cpu"));
  try {
    check_memory("the weights", 1e18, "cpu");
    FAIL() << "1e18 bytes were accepted";
  } catch (const OutOfMemory& error) {
    EXPECT_EQ(std::string(error.what()).rfind("the weights: needs 909494.70 TiB on cpu, ", 0), 0u) << error.what();
  }
  EXPECT_EQ(out_of_memory_text("a cache", 1 << 30, "cuda:1", 1 << 29),
            "a cache: needs 1.00 GiB on cuda, 512.00 MiB available");
}

TEST(Memory, AContainersLimitCountsWithFilePagesAsFree) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  const TempFolder folder;
  EXPECT_EQ(container_memory(folder.path(), folder / "groups"), kNone);  // no control groups here
  write_file(folder / "memory.max", "1000000\n");
  EXPECT_EQ(container_memory(folder.path(), folder / "groups"), kNone);  // nor without the memory in use
  write_file(folder / "memory.current", "400000\n");
  EXPECT_EQ(container_memory(folder.path(), folder / "groups"), 600000);
  write_file(folder / "memory.stat", "anon 300000\nfile 90000\ninactive_file 70000\nactive_file 20000\n");
  EXPECT_EQ(container_memory(folder.path(), folder / "groups"), 670000);
  write_file(folder / "memory.max", "max\n");
  EXPECT_EQ(container_memory(folder.path(), folder / "groups"), kNone);
}

TEST(Memory, TheSmallestLimitOfTheProcessesOwnGroupsCounts) {
  const TempFolder folder;
  for (const char* group : {"a", "memory/b"}) std::filesystem::create_directories(folder / group);
  write_file(folder / "groups", "5:cpu,cpuacct:/b\n4:memory:/b\n0::/a\n");
  const auto available = [&] { return container_memory(folder.path(), folder / "groups"); };
  write_file(folder / "memory/b/memory.limit_in_bytes", "9223372036854771712\n");
  write_file(folder / "memory/b/memory.usage_in_bytes", "4096\n");
  EXPECT_GT(available(), int64_t{1} << 60);
  write_file(folder / "memory/b/memory.limit_in_bytes", "900000\n");
  write_file(folder / "memory/b/memory.usage_in_bytes", "500000\n");
  write_file(folder / "memory/b/memory.stat", "inactive_file 1\ntotal_inactive_file 70000\n");
  EXPECT_EQ(available(), 470000);
  write_file(folder / "a/memory.max", "100000\n");
  write_file(folder / "a/memory.current", "40000\n");
  EXPECT_EQ(available(), 60000);
  write_file(folder / "memory.max", "50000\n");
  write_file(folder / "memory.current", "1\n");
  EXPECT_EQ(available(), 49999);
}

}  // namespace
}  // namespace mixtral
