// How processes become ranks. The other ranks are this program again: it runs RanksProgram.Follows alone.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "distributed/ranks.h"
#include "distributed/sockets.h"
#include "io/load_error.h"
#include "rank_group.h"

namespace mixtral {
namespace {

constexpr const char* kBackend = "TEST_RANKS_BACKEND";  // of the program

RankOptions options_of(int size, const std::string& backend, double timeout = 20) {
  RankOptions options;
  options.tensor_size = size;
  options.backend = backend;
  options.timeout = timeout;
  options.command = {std::filesystem::read_symlink("/proc/self/exe"), "--gtest_filter=RanksProgram.Follows"};
  setenv(kBackend, backend.c_str(), 1);
  return options;
}

// A thread count that a test changes, and that is back after it.
struct KeepThreads {
  ~KeepThreads() { at::set_num_threads(before); }
  const int before = at::get_num_threads();
};

bool runs(pid_t process) {  // and is no zombie
  std::ifstream file("/proc/" + std::to_string(process) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return false;
  return line.at(line.rfind(')') + 2) != 'Z';
}

bool ends(pid_t process, double seconds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (runs(process)) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return true;
}

// What every rank does; the leader decides how often.
std::vector<pid_t> greet(Communicator& ranks) {
  std::vector<pid_t> processes;
  for (const std::string& text : ranks.exchange_texts(std::to_string(getpid()))) processes.push_back(std::stoi(text));
  return processes;
}
bool sum_is_right(Communicator& ranks) {
  const int size = ranks.size();
  const torch::Tensor sum = ranks.all_reduce_ordered(torch::full({1000}, ranks.rank() + 1));
  return sum.eq(size * (size + 1) / 2).all().item<bool>();
}

TEST(RanksProgram, Follows) {
  const char* leader = std::getenv("MIXTRAL_LEADER");
  if (leader == nullptr) GTEST_SKIP() << "a program of the tests below";
  const auto ranks = join_ranks(options_of(std::stoi(std::getenv("WORLD_SIZE")), std::getenv(kBackend)));
  std::puts("this must not appear on the leader's output");
  EXPECT_EQ(std::getenv("RANK"), nullptr);
  greet(*ranks);
  for (;;) {
    const torch::Tensor go_on = torch::zeros({1}, torch::kInt32);
    ranks->broadcast(go_on, 0);
    if (go_on.item<int>() == 0) break;
    EXPECT_TRUE(sum_is_right(*ranks));
  }
}

class LocalRanks : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, LocalRanks, testing::Values("shm", "gloo"), [](const auto& info) { return info.param; });

TEST_P(LocalRanks, AreStartedWorkAndEndWithoutAZombie) {
  const KeepThreads threads;
  at::set_num_threads(4);
  unsetenv("OMP_NUM_THREADS");
  testing::internal::CaptureStdout();
  auto ranks = join_ranks(options_of(3, GetParam()));
  EXPECT_EQ(at::get_num_threads(), 1);
  ASSERT_EQ(ranks->size(), 3);
  EXPECT_EQ(ranks->rank(), 0);
  const std::vector<pid_t> processes = greet(*ranks);
  for (int round = 0; round < 3; ++round) {
    ranks->broadcast(torch::ones({1}, torch::kInt32), 0);
    EXPECT_TRUE(sum_is_right(*ranks));
  }
  for (int rank = 1; rank < 3; ++rank) {  // a signal to the whole process group is the leader's
    kill(processes[rank], SIGINT);
    kill(processes[rank], SIGTERM);
  }
  ranks->broadcast(torch::ones({1}, torch::kInt32), 0);
  EXPECT_TRUE(sum_is_right(*ranks));
  ranks->broadcast(torch::zeros({1}, torch::kInt32), 0);
  ranks.reset();
  for (int rank = 1; rank < 3; ++rank) EXPECT_NE(kill(processes[rank], 0), 0) << "rank " << rank << " is still there";
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
}

TEST_P(LocalRanks, AStoppedOneIsNamedAndEnded) {
  const KeepThreads threads;
  auto ranks = join_ranks(options_of(2, GetParam(), /*timeout=*/1));
  const pid_t follower = greet(*ranks)[1];
  kill(follower, SIGSTOP);
  ranks->broadcast(torch::ones({1}, torch::kInt32), 0);
  try {
    sum_is_right(*ranks);
    ADD_FAILURE() << "no RankError";
  } catch (const RankError& error) {
    EXPECT_STREQ(error.what(), "rank 1 was silent for 1 s");
  }
  ranks.reset();
  EXPECT_FALSE(runs(follower));
}

TEST_P(LocalRanks, OneThatDoesNotStartIsNoticedAtOnce) {
  const KeepThreads threads;
  RankOptions options = options_of(2, GetParam());
  options.command = {"false"};
  const auto start = std::chrono::steady_clock::now();
  try {
    greet(*join_ranks(options));
    ADD_FAILURE() << "no RankError";
  } catch (const RankError& error) {
    EXPECT_EQ(error.rank, 1) << error.what();
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
  options.command = {"/no/such/program"};
  EXPECT_THROW(join_ranks(options), std::system_error);
}

TEST_P(LocalRanks, EndWithALeaderThatIsKilled) {
  int ends_of_pipe[2];
  ASSERT_EQ(pipe(ends_of_pipe), 0);
  const pid_t leader = fork();
  if (leader == 0) {
    std::shared_ptr<Communicator> ranks;
    // The thread that starts them may end before the process.
    std::thread([&] { ranks = join_ranks(options_of(3, GetParam())); }).join();
    const auto processes = greet(*ranks);
    ranks->broadcast(torch::ones({1}, torch::kInt32), 0);
    const bool right = sum_is_right(*ranks);
    if (right && write(ends_of_pipe[1], processes.data(), 3 * sizeof(pid_t)) > 0) pause();
    _exit(1);
  }
  pid_t processes[3] = {};
  ASSERT_EQ(read(ends_of_pipe[0], processes, sizeof processes), static_cast<ssize_t>(sizeof processes));
  kill(processes[1], SIGSTOP);
  ASSERT_EQ(processes[0], leader);
  EXPECT_TRUE(runs(processes[2]));
  kill(leader, SIGKILL);
  waitpid(leader, nullptr, 0);
  for (int rank = 1; rank < 3; ++rank) EXPECT_TRUE(ends(processes[rank], 5)) << "rank " << rank << " is an orphan";
  close(ends_of_pipe[0]);
  close(ends_of_pipe[1]);
}

// As torchrun starts them, without its agent's store.
TEST_P(LocalRanks, JoinThoseThatAreThere) {
  for (const char* local_size : {"3", "1"}) {
    if (GetParam() == "shm" && std::string(local_size) == "1") continue;
    const Listener free_port = listen_at("127.0.0.1", 0);
    ::close(free_port.descriptor);
    const auto join = [&](int rank) {
      setenv("RANK", std::to_string(rank).c_str(), 1);
      setenv("WORLD_SIZE", "3", 1);
      setenv("LOCAL_WORLD_SIZE", local_size, 1);
      setenv("LOCAL_RANK", "0", 1);
      setenv("MASTER_ADDR", "127.0.0.1", 1);
      setenv("MASTER_PORT", std::to_string(free_port.port).c_str(), 1);
      if (std::string(local_size) == "1") setenv("GLOO_SOCKET_IFNAME", "lo", 1);
      return join_ranks(options_of(3, GetParam()));
    };
    run_as_processes(3, join, [](Communicator& ranks) {
      check_same(ranks, "a\nb");
      EXPECT_TRUE(sum_is_right(ranks));
    });
  }
}

TEST(JoinRanks, OneIsNoGroup) { EXPECT_EQ(join_ranks({}), nullptr); }

TEST(JoinRanks, OptionsThatCannotBeAreRefused) {
  RankOptions options;
  options.tensor_size = 0;
  EXPECT_THROW(join_ranks(options), std::invalid_argument);
  options.tensor_size = 2;
  options.backend = "mpi";
  EXPECT_THROW(join_ranks(options), std::invalid_argument);
  options.backend = "nccl";
  EXPECT_THROW(join_ranks(options), std::invalid_argument);
  options.backend = "shm";
  options.device = "cuda";
  EXPECT_THROW(join_ranks(options), std::invalid_argument);
}

std::string load_error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const LoadError& error) {
    return error.what();
  }
  return "no LoadError";
}

TEST(JoinRanks, AWorldOfAnotherSizeIsRefused) {
  setenv("RANK", "0", 1);
  RankOptions options;
  options.tensor_size = 2;
  options.stages = 3;
  setenv("WORLD_SIZE", "4", 1);
  EXPECT_EQ(load_error_of([&] { join_ranks(options); }),
            "WORLD_SIZE: is 4, but the model is cut into 6 parts: 2 by tensors, 3 by layers");
  setenv("WORLD_SIZE", "6", 1);
  EXPECT_EQ(load_error_of([&] { join_ranks(options); }), "MASTER_ADDR: is not set, though RANK is");
  setenv("WORLD_SIZE", "four", 1);
  EXPECT_EQ(load_error_of([&] { join_ranks(options); }), "WORLD_SIZE: must be a number, got four");
  unsetenv("RANK");
  unsetenv("WORLD_SIZE");
}

TEST(CheckSame, TheFirstLineThatDiffersIsNamed) {
  run_as_threads(shm_group(3, 20), [](Communicator& ranks) {
    check_same(ranks, "config 1\ndtype bfloat16\n");
    const std::string dtype = ranks.rank() == 2 ? "float32" : "bfloat16";
    EXPECT_EQ(load_error_of([&] { check_same(ranks, "config 1\ndtype " + dtype + "\nlayout x\n"); }),
              "rank 2: has dtype float32, but rank 0 has dtype bfloat16");
    EXPECT_EQ(load_error_of([&] { check_same(ranks, ranks.rank() == 1 ? "a\nb" : "a"); }),
              "rank 1: has b, but rank 0 has nothing");
  });
}

TEST(LoadTogether, AFailureOfOneIsOneOfAll) {
  run_as_threads(shm_group(2, 20), [](Communicator& ranks) {
    int loaded = 0;
    load_together(ranks, [&] { ++loaded; });
    EXPECT_EQ(loaded, 1);
    const auto load = [&] {
      if (ranks.rank() == 1) throw LoadError("model.safetensors", "lm_head.weight", "is missing");
    };
    const std::string reason = "model.safetensors: lm_head.weight: is missing";
    EXPECT_EQ(load_error_of([&] { load_together(ranks, load); }), ranks.rank() == 1 ? reason : "rank 1: " + reason);
  });
}

}  // namespace
}  // namespace mixtral
