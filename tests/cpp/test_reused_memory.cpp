// Memory that is kept from one training step to the next.
#include <gtest/gtest.h>

#include <cstring>

#include "ops/cpu/reused_memory.h"

namespace mixtral::cpu {
namespace {

constexpr size_t kBytes = 1 << 20;

TEST(ReusedMemory, ABlockServesTheNextOfItsSize) {
  void *const first = take_memory(kBytes), *const second = take_memory(kBytes), *const other = take_memory(2 * kBytes);
  EXPECT_TRUE(first != second && first != other && second != other);
  std::memset(first, 1, kBytes);
  return_memory(first, kBytes);
  return_memory(other, 2 * kBytes);
  EXPECT_EQ(take_memory(kBytes), first);  // what was freed last, of this size
  void *const third = take_memory(kBytes);
  EXPECT_TRUE(third != first && third != second && third != other);
  for (void *data : {first, second, third}) return_memory(data, kBytes);
  EXPECT_EQ(memory_in_use().taken, 0U);
}

TEST(ReusedMemory, NoMoreStaysIdleThanIsTaken) {
  void *const used = take_memory(3 * kBytes);
  void *const old = take_memory(4 * kBytes), *const small = take_memory(2 * kBytes);
  return_memory(old, 4 * kBytes);
  return_memory(small, 2 * kBytes);
  void *const another = take_memory(5 * kBytes);  // no idle block has its size, so some go until at most 3 MiB are idle
  EXPECT_EQ(memory_in_use().idle, 2 * kBytes);    // the one that was freed first has gone
  EXPECT_EQ(take_memory(2 * kBytes), small);
  return_memory(small, 2 * kBytes);
  return_memory(used, 3 * kBytes);
  return_memory(another, 5 * kBytes);
  return_memory(take_memory(kBytes), kBytes);  // a new size, and nothing is taken
  EXPECT_EQ(memory_in_use().idle, kBytes);
}

}  // namespace
}  // namespace mixtral::cpu
