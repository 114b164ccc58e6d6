// Runs a test's body as every rank of a group: on threads, or in processes that are forked and end with it.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "distributed/shm.h"
#include "engine/threads.h"

namespace mixtral {

using RankBody = std::function<void(Communicator&)>;

inline void run_as_threads(const std::vector<std::shared_ptr<Communicator>>& ranks, const RankBody& body) {
  std::vector<std::thread> threads;
  for (const auto& rank : ranks) {
    threads.emplace_back([&body, rank]() mutable {
      try {
        body(*rank);
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank->rank() << ": " << error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// `join` is called in each process. Rank `killed` ends by SIGKILL of its own, every other one in order.
inline void run_as_processes(int size, const std::function<std::shared_ptr<Communicator>(int rank)>& join,
                             const RankBody& body, int killed = -1) {
  std::fflush(nullptr);
  std::vector<pid_t> processes;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t process = fork();
    if (process == 0) {
      use_threads(1);  // those of the parent are not here
      try {
        const std::shared_ptr<Communicator> communicator = join(rank);
        body(*communicator);
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank << ": " << error.what();
      }
      std::fflush(nullptr);
      _exit(testing::Test::HasFailure() ? 1 : 0);
    }
    ASSERT_GT(process, 0);
    processes.push_back(process);
  }
  for (int rank = 0; rank < size; ++rank) {
    int status = 0;
    ASSERT_EQ(waitpid(processes[rank], &status, 0), processes[rank]);
    if (rank == killed)
      EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "rank " << rank;
    else
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "rank " << rank << ", status " << status;
  }
}

}  // namespace mixtral
