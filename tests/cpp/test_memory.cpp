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
    EXPECT_EQ(std::string(error.what()).rfind("the weights: needs 931322574.62 GiB on cpu, ", 0), 0u) << error.what();
  }
  EXPECT_EQ(out_of_memory_text("a cache", 1 << 30, "cuda:1", 1 << 29),
            "a cache: needs 1.00 GiB on cuda, 0.50 GiB available");
}

TEST(Memory, AContainersLimitCountsWithFilePagesAsFree) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  const TempFolder folder;
  EXPECT_EQ(container_memory(folder.path()), kNone);  // no control groups here
  write_file(folder / "memory.max", "1000000\n");
  EXPECT_EQ(container_memory(folder.path()), kNone);  // nor without the memory in use
  write_file(folder / "memory.current", "400000\n");
  EXPECT_EQ(container_memory(folder.path()), 600000);
  write_file(folder / "memory.stat", "anon 300000\nfile 90000\ninactive_file 70000\nactive_file 20000\n");
  EXPECT_EQ(container_memory(folder.path()), 670000);
  write_file(folder / "memory.max", "max\n");
  EXPECT_EQ(container_memory(folder.path()), kNone);
}

}  // namespace
}  // namespace mixtral
