// Runs a test's body as every rank of a group: on threads, or in processes that are forked and end with it.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "distributed/c10d.h"
#include "distributed/shm.h"
#include "distributed/sockets.h"
#include "engine/threads.h"

namespace mixtral {

using RankBody = std::function<void(Communicator&)>;

inline void run_as_threads(std::vector<std::shared_ptr<Communicator>> ranks, const RankBody& body) {
  std::vector<std::thread> threads;
  for (auto& moved : ranks) {
    threads.emplace_back([&body, rank = std::move(moved)] {
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

struct RankCase {
  std::string backend;  // "threads" and "shm": through shared memory
  int size;
};

inline void PrintTo(const RankCase& value, std::ostream* out) { *out << value.backend << " of " << value.size; }

class Ranks : public testing::TestWithParam<RankCase> {
 protected:
  static int size() { return GetParam().size; }
  static void run(const RankBody& body, double timeout = 20, int killed = -1) {
    if (GetParam().backend == "threads") return run_as_threads(shm_group(size(), timeout), body);
    if (GetParam().backend == "gloo") return run_over_gloo(body, timeout, killed);
    const auto segment = ShmSegment::create(size());
    run_as_processes(
        size(), [&](int rank) { return join_shm(segment, rank, timeout); }, body, killed);
  }

 private:
  static void run_over_gloo(const RankBody& body, double timeout, int killed) {
    const Listener listener = listen_at("127.0.0.1", 0);
    const auto join = [&](int rank) {
      Rendezvous rendezvous{rank, size(), "127.0.0.1", listener.port, {}, timeout};
      if (rank == 0)
        rendezvous.listener = listener.descriptor;
      else
        ::close(listener.descriptor);
      return join_c10d(std::make_shared<RankStore>(rendezvous), "gloo", "127.0.0.1", torch::kCPU);
    };
    run_as_processes(size(), join, body, killed);
    ::close(listener.descriptor);
  }
};

inline const auto kRankCases = testing::Values(RankCase{"threads", 2}, RankCase{"threads", 3}, RankCase{"shm", 2},
                                               RankCase{"shm", 4}, RankCase{"gloo", 2}, RankCase{"gloo", 4});
inline std::string name_of(const testing::TestParamInfo<RankCase>& info) {
  return info.param.backend + std::to_string(info.param.size);
}

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The error with which `body` must end.
inline RankError rank_error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const RankError& error) {
    return error;
  }
  ADD_FAILURE() << "no RankError";
  return RankError(-1, "");
}

}  // namespace mixtral
