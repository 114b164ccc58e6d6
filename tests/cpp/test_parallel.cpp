// Loops of the model's library run on the threads of operators.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "engine/threads.h"
#include "model/parallel.h"

namespace mixtral {
namespace {

// A body waits for the other one: on one thread the first would never meet the second.
TEST(Parallel, BodiesRunAtTheSameTime) {
  const int before = num_threads();
  use_threads(2);
  std::atomic<int> arrived = 0, met = 0;
  parallel_for(2, 1, [&](int64_t begin, int64_t end) {
    arrived += static_cast<int>(end - begin);
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (arrived < 2 && std::chrono::steady_clock::now() < give_up) std::this_thread::yield();
    if (end - begin == 1 && arrived == 2) ++met;
  });
  use_threads(before);
  EXPECT_EQ(met, 2);
}

TEST(Parallel, EveryIndexIsVisitedOnce) {
  std::vector<int> visits(1000);
  parallel_for(1000, 7, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
  });
  EXPECT_EQ(visits, std::vector<int>(1000, 1));
}

TEST(Parallel, AnExceptionReachesTheCaller) {
  const auto fail = [](int64_t begin, int64_t) { throw std::out_of_range("from " + std::to_string(begin)); };
  EXPECT_THROW(parallel_for(1000, 1, fail), std::out_of_range);
}

}  // namespace
}  // namespace mixtral
