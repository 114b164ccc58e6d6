// The same exchanges between threads and between processes, through shared memory and over Gloo.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <random>
#include <set>

#include "rank_group.h"

namespace mixtral {
namespace {

INSTANTIATE_TEST_SUITE_P(All, Ranks, kRankCases, name_of);

torch::Tensor pattern(int64_t bytes, int seed) {
  torch::Tensor tensor = torch::empty({bytes}, torch::kByte);
  std::mt19937 random(static_cast<unsigned>(seed));
  for (int64_t i = 0; i < bytes; ++i) tensor.mutable_data_ptr<uint8_t>()[i] = static_cast<uint8_t>(random());
  return tensor;
}

bool equal_bits(const torch::Tensor& left, const torch::Tensor& right) {
  return left.nbytes() == right.nbytes() && left.scalar_type() == right.scalar_type() &&
         (left.nbytes() == 0 || std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()) == 0);
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
        EXPECT_TRUE(equal_bits(receives[i].tensor, expected[i])) << "round " << round << ", message " << i;
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
    EXPECT_TRUE(equal_bits(large, pattern(2'000'000, other)));
    EXPECT_TRUE(equal_bits(small, pattern(5, 10 + other)));
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
      EXPECT_TRUE(equal_bits(all, expected));
      const int root = ranks.size() - 1;
      all = own_rows();
      ranks.gather(all, rows, root);
      EXPECT_TRUE(equal_bits(all, ranks.rank() == root ? expected : own_rows()));
      all = ranks.rank() == root ? expected.clone() : torch::zeros_like(expected);
      ranks.broadcast(all, root);
      EXPECT_TRUE(equal_bits(all, expected));
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
              std::ldexp(static_cast<float>(static_cast<int32_t>(random())), static_cast<int>(random() % 24) - 43);
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
      EXPECT_TRUE(equal_bits(ranks.all_reduce_ordered(own), expected.to(type)));
      EXPECT_TRUE(equal_bits(own, parts[ranks.rank()]));
    }
  });
}

TEST_P(Ranks, AMistakeOfTheCallerIsNobodysFailure) {
  run([](Communicator& ranks) {
    const int other = (ranks.rank() + 1) % ranks.size();
    EXPECT_THROW(ranks.send(torch::zeros({3, 4}).t(), other), std::invalid_argument);
    EXPECT_THROW(ranks.receive(torch::zeros({3}), ranks.rank()), std::invalid_argument);
    EXPECT_THROW(ranks.send(torch::zeros({3}), ranks.size()), std::invalid_argument);
    EXPECT_THROW(ranks.send(torch::zeros({3}), -1), std::invalid_argument);
    ranks.barrier();
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
