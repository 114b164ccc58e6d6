// The same exchanges between threads, and between processes.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <random>
#include <set>

#include "distributed/communicator.h"
#include "rank_group.h"

namespace mixtral {
namespace {

struct Case {
  std::string backend;  // threads, or processes: shm
  int size;
};

void PrintTo(const Case& value, std::ostream* out) { *out << value.backend << " of " << value.size; }

class Ranks : public testing::TestWithParam<Case> {
 protected:
  static int size() { return GetParam().size; }
  static void run(const RankBody& body, double timeout = 20, int killed = -1) {
    if (GetParam().backend == "threads") return run_as_threads(shm_group(size(), timeout), body);
    const auto segment = ShmSegment::create(size());
    run_as_processes(
        size(), [&](int rank) { return join_shm(segment, rank, timeout); }, body, killed);
  }
};

const auto name_of = [](const testing::TestParamInfo<Case>& info) {
  return info.param.backend + std::to_string(info.param.size);
};
INSTANTIATE_TEST_SUITE_P(All, Ranks,
                         testing::Values(Case{"threads", 2}, Case{"threads", 3}, Case{"shm", 2}, Case{"shm", 4}),
                         name_of);

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

torch::Tensor pattern(int64_t bytes, int seed) {
  torch::Tensor tensor = torch::empty({bytes}, torch::kByte);
  std::mt19937 random(static_cast<unsigned>(seed));
  for (int64_t i = 0; i < bytes; ++i) tensor.mutable_data_ptr<uint8_t>()[i] = static_cast<uint8_t>(random());
  return tensor;
}

bool same_bits(const torch::Tensor& left, const torch::Tensor& right) {
  return left.nbytes() == right.nbytes() && left.scalar_type() == right.scalar_type() &&
         std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()) == 0;
}

// The error with which `body` must end.
RankError error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const RankError& error) {
    return error;
  }
  ADD_FAILURE() << "no RankError";
  return RankError(-1, "");
}

TEST_P(Ranks, RandomMessagesArriveInOrderAndAreCounted) {
  run([](Communicator& ranks) {
    const std::vector<int64_t> sizes = {0, 1, 7, 1000, 16384, 300'000, 1'000'000};
    std::mt19937 random(5);  // the same on every rank
    uint64_t bytes = 0;
    for (int round = 0; round < 12; ++round) {
      std::vector<Communicator::Send> sends;
      std::vector<Communicator::Receive> receives;
      std::vector<torch::Tensor> expected;
      for (int message = 0; message < 6; ++message) {
        const int from = static_cast<int>(random() % ranks.size());
        const int to = static_cast<int>((from + 1 + random() % (ranks.size() - 1)) % ranks.size());
        const int64_t size = sizes[random() % sizes.size()];
        const int seed = static_cast<int>(random() % 1'000'000);
        if (from == ranks.rank()) {
          sends.push_back({pattern(size, seed), to});
          bytes += static_cast<uint64_t>(size);
        }
        if (to == ranks.rank()) {
          expected.push_back(pattern(size, seed));
          receives.push_back({torch::zeros({size}, torch::kByte), from});
        }
      }
      ranks.exchange(sends, receives);
      for (size_t i = 0; i < receives.size(); ++i)
        EXPECT_TRUE(same_bits(receives[i].tensor, expected[i])) << "round " << round << ", message " << i;
    }
    EXPECT_EQ(ranks.bytes_sent(), bytes);
  });
}

TEST_P(Ranks, LongMessagesMayCross) {
  run([](Communicator& ranks) {
    if (ranks.rank() > 1) return;
    const int other = 1 - ranks.rank();
    ranks.send(pattern(2'000'000, ranks.rank()), other);
    ranks.send(pattern(5, 10 + ranks.rank()), other);
    const torch::Tensor large = torch::zeros({2'000'000}, torch::kByte), small = torch::zeros({5}, torch::kByte);
    ranks.receive(large, other);
    ranks.receive(small, other);
    EXPECT_TRUE(same_bits(large, pattern(2'000'000, other)));
    EXPECT_TRUE(same_bits(small, pattern(5, 10 + other)));
    ranks.exchange({{small, other}}, {{small.clone(), other}});  // neither ends before the other has all
  });
}

TEST_P(Ranks, ASentTensorMayBeChanged) {
  run([](Communicator& ranks) {
    if (ranks.rank() > 1) return;
    for (int round = 0; round < 20; ++round) {
      const torch::Tensor tensor = torch::full({1000}, round, torch::kInt32);
      if (ranks.rank() == 0) {
        ranks.send(tensor, 1);
        tensor.fill_(-1);
      } else {
        tensor.zero_();
        ranks.receive(tensor, 0);
        EXPECT_TRUE(tensor.eq(round).all().item<bool>());
      }
    }
  });
}

TEST_P(Ranks, GathersOfUnevenRowsAndBroadcasts) {
  run([](Communicator& ranks) {
    const std::vector<std::vector<int64_t>> cases = {{3, 0, 2, 1}, {0, 5, 0, 0}, {0, 0, 0, 0}, {400, 1, 300, 2}};
    for (std::vector<int64_t> rows : cases) {
      rows.resize(ranks.size());
      const int64_t count = std::accumulate(rows.begin(), rows.end(), int64_t{0});
      const torch::Tensor expected = torch::arange(count * 500, torch::kFloat32).view({count, 500});
      const int64_t begin = std::accumulate(rows.begin(), rows.begin() + ranks.rank(), int64_t{0});
      const auto own_rows = [&] {
        torch::Tensor all = torch::full_like(expected, -1);
        all.narrow(0, begin, rows[ranks.rank()]).copy_(expected.narrow(0, begin, rows[ranks.rank()]));
        return all;
      };
      torch::Tensor all = own_rows();
      ranks.all_gather(all, rows);
      EXPECT_TRUE(same_bits(all, expected));
      const int root = ranks.size() - 1;
      all = own_rows();
      ranks.gather(all, rows, root);
      EXPECT_TRUE(same_bits(all, ranks.rank() == root ? expected : own_rows()));
      all = ranks.rank() == root ? expected.clone() : torch::zeros_like(expected);
      ranks.broadcast(all, root);
      EXPECT_TRUE(same_bits(all, expected));
    }
    EXPECT_THROW(ranks.all_gather(torch::zeros({3}), std::vector<int64_t>(ranks.size(), 7)), std::invalid_argument);
    ranks.barrier();
  });
}

TEST_P(Ranks, SumsAreTakenInTheOrderOfTheRanksAndRoundedOnce) {
  run([](Communicator& ranks) {
    for (const auto type : {torch::kFloat32, torch::kBFloat16, torch::kFloat16}) {
      std::vector<torch::Tensor> parts;
      for (int rank = 0; rank < ranks.size(); ++rank) {
        torch::Tensor part = torch::empty({3, 2111});
        std::mt19937 random(100 + static_cast<unsigned>(rank));
        for (int64_t i = 0; i < part.numel(); ++i)
          part.mutable_data_ptr<float>()[i] =
              std::ldexp(static_cast<float>(random() % 4001) - 2000.f, random() % 12 - 8);
        parts.push_back(part.to(type));
      }
      torch::Tensor expected = torch::zeros({3, 2111});
      std::vector<torch::Tensor> wide;
      for (const torch::Tensor& part : parts) wide.push_back(part.to(torch::kFloat32));
      for (int64_t i = 0; i < expected.numel(); ++i) {
        float sum = wide[0].const_data_ptr<float>()[i];
        for (size_t rank = 1; rank < wide.size(); ++rank) sum += wide[rank].const_data_ptr<float>()[i];
        expected.mutable_data_ptr<float>()[i] = sum;
      }
      const torch::Tensor own = parts[ranks.rank()].clone();
      EXPECT_TRUE(same_bits(ranks.all_reduce_ordered(own), expected.to(type)));
      EXPECT_TRUE(same_bits(own, parts[ranks.rank()]));
    }
  });
}

TEST_P(Ranks, SubgroupsNumberTheirMembersAnew) {
  run([](Communicator& ranks) {
    const std::shared_ptr<Communicator> whole(&ranks, [](Communicator*) {});
    if (ranks.rank() > 1) {
      EXPECT_THROW(subgroup(whole, {1, 0}), std::invalid_argument);
      return;
    }
    const auto group = subgroup(whole, {1, 0});
    EXPECT_EQ(group->size(), 2);
    EXPECT_EQ(group->rank(), 1 - ranks.rank());
    const torch::Tensor all = torch::full({2}, ranks.rank(), torch::kInt64);
    group->all_gather(all, {1, 1});
    EXPECT_TRUE(torch::equal(all, torch::tensor({1, 0}, torch::kInt64)));
  });
}

TEST_P(Ranks, TextsOfAnyLengthAreExchangedAgainAndAgain) {
  run([](Communicator& ranks) {
    for (int round = 0; round < 3; ++round) {
      const auto text_of = [&](int rank) { return std::string(rank * 70'000 + round, static_cast<char>('a' + rank)); };
      const auto texts = ranks.exchange_texts(text_of(ranks.rank()));
      ASSERT_EQ(static_cast<int>(texts.size()), ranks.size());
      for (int rank = 0; rank < ranks.size(); ++rank) EXPECT_EQ(texts[rank], text_of(rank));
    }
  });
}

TEST_P(Ranks, ASilentRankIsNamedAfterTheTimeout) {
  const auto start = std::chrono::steady_clock::now();
  run(
      [](Communicator& ranks) {
        ranks.barrier();
        const torch::Tensor tensor = torch::zeros({4});
        if (ranks.rank() == 1) {
          std::this_thread::sleep_for(std::chrono::milliseconds(2300));
          return;
        }
        // Rank 0 waits for the last one, which waits for the silent one.
        const int from = ranks.rank() == 0 && ranks.size() > 2 ? ranks.size() - 1 : 1;
        const RankError error = error_of([&] { ranks.receive(tensor, from); });
        EXPECT_EQ(error.rank, 1);
        EXPECT_STREQ(error.what(), "rank 1 was silent for 1 s");
        EXPECT_EQ(error_of([&] { ranks.barrier(); }).rank, 1);  // of no more use
      },
      /*timeout=*/1);
  EXPECT_LT(seconds_since(start), 30);
}

TEST_P(Ranks, ARankThatIsAliveMayKeepTheOthersWaiting) {
  run(
      [](Communicator& ranks) {
        if (ranks.rank() == 1) {
          for (int i = 0; i < 20; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            ranks.keep_alive();
          }
        }
        EXPECT_EQ(ranks.exchange_texts("x").back(), "x");
      },
      /*timeout=*/0.7);
}

TEST_P(Ranks, TheReasonOfAFailureReachesTheOthers) {
  run([](Communicator& ranks) {
    const torch::Tensor tensor = torch::zeros({4});
    ranks.barrier();
    if (ranks.rank() == 1) return ranks.fail("no memory for layer 3");
    const int from = ranks.rank() == 0 && ranks.size() > 2 ? ranks.size() - 1 : 1;
    const RankError error = error_of([&] { ranks.receive(tensor, from); });
    EXPECT_STREQ(error.what(), "rank 1 failed: no memory for layer 3");
    ranks.fail("something that follows from it");
    EXPECT_EQ(error.rank, 1);
  });
}

TEST_P(Ranks, WhatARankSentBeforeItsEndArrives) {
  run([](Communicator& ranks) {
    const torch::Tensor tensor = torch::zeros({70'000});
    if (ranks.rank() == 1) {
      ranks.send(torch::ones({1000}), 0);
      ranks.send(torch::ones({50'000}), 0);
      return;
    }
    if (ranks.rank() != 0) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    ranks.receive(tensor.narrow(0, 0, 1000), 1);
    ranks.receive(tensor.narrow(0, 1000, 50'000), 1);
    EXPECT_EQ(tensor.sum().item<float>(), 51'000);
  });
}

TEST_P(Ranks, AKilledRankIsNoticedAtOnce) {
  if (GetParam().backend == "threads") GTEST_SKIP() << "a thread cannot be killed alone";
  for (const int killed : {0, size() - 1}) {
    run(
        [&](Communicator& ranks) {
          ranks.barrier();
          if (ranks.rank() == killed) {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            std::raise(SIGKILL);
          }
          const auto start = std::chrono::steady_clock::now();
          const RankError error = error_of([&] { ranks.barrier(); });
          EXPECT_EQ(error.rank, killed) << error.what();
          EXPECT_LT(seconds_since(start), 10);
        },
        /*timeout=*/60, killed);
  }
}

TEST(RankSegments, NothingIsLeftBehind) {
  const auto files = [] {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) names.insert(entry.path());
    return names;
  };
  const auto before = files();
  const auto group = shm_group(3, 1);
  EXPECT_EQ(files(), before);
}

TEST(RankSegments, AnotherDescriptorIsRefused) {
  EXPECT_THROW(ShmSegment::open(::open("/dev/null", 0)), std::runtime_error);
  EXPECT_THROW(ShmSegment::open(-1), std::runtime_error);
}

}  // namespace
}  // namespace mixtral
