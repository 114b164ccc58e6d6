// Messages of rank 0, whole and damaged, and when it sends which.
#include <gtest/gtest.h>

#include <functional>
#include <thread>

#include "distributed/shm.h"
#include "model/leader.h"
#include "model/rank_message.h"
#include "split_model.h"

namespace mixtral {
namespace {

std::string runtime_error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// What a rank makes of `parts`, sent to it as its message `number`.
std::string error_of_parts(const std::vector<torch::Tensor>& parts, int64_t number) {
  const auto ranks = shm_group(2, 5);
  for (const auto& part : parts) ranks[0]->send(part, 1);
  return runtime_error_of([&] { receive_message(*ranks[1], number); });
}

const RankMessage kMessage = {Command::kForward, {3, 1, 4, 1, 5, 9, 2, 6}};

TEST(RankMessage, ComesAsItWasSent) {
  const auto ranks = shm_group(2, 5);
  for (const RankMessage& sent : {kMessage, RankMessage{Command::kStop, {}}}) {
    for (const auto& part : encode_message(sent, 7, torch::kCPU)) ranks[0]->send(part, 1);
    const RankMessage received = receive_message(*ranks[1], 7);
    EXPECT_EQ(received.command, sent.command);
    EXPECT_EQ(received.words, sent.words);
  }
}

TEST(RankMessage, EveryDamagedWordIsNoticed) {
  ASSERT_EQ(error_of_parts(encode_message(kMessage, 7, torch::kCPU), 7), "");
  for (const size_t part : {0, 1}) {
    const int64_t words = encode_message(kMessage, 7, torch::kCPU)[part].numel();
    for (int64_t word = 0; word < words; ++word)
      for (const int64_t bit : {0, 17, 62}) {
        const auto parts = encode_message(kMessage, 7, torch::kCPU);
        parts[part].data_ptr<int64_t>()[word] ^= int64_t{1} << bit;
        EXPECT_EQ(error_of_parts(parts, 7), part == 0
                                                ? "message 7 of rank 0 is damaged: the checksum of its header differs"
                                                : "message 7 of rank 0 is damaged: its checksum differs")
            << part << ", " << word << ", " << bit;
      }
  }
}

TEST(RankMessage, OneThatIsNotTheNextIsRefused) {
  const std::string expected = "message 8 of rank 0 is not the next one: its number is 7";
  EXPECT_EQ(error_of_parts(encode_message(kMessage, 7, torch::kCPU), 8), expected);  // repeated
}

TEST(RankMessage, UnknownCommandsAndSizesAreRefused) {
  const RankMessage unknown = {static_cast<Command>(99), {}};
  EXPECT_EQ(error_of_parts(encode_message(unknown, 0, torch::kCPU), 0),
            "message 0 of rank 0 has an unknown command 99");
}

TEST(RankMessage, ChecksumIsThatOfZip) { EXPECT_EQ(crc32("123456789", 9), 0xCBF43926u); }

TEST(RankMessage, PassesKeepAllTensors) {
  RollingKVCache cache(tiny_config(), {4, 16, 8, torch::kCPU, torch::kFloat32});
  EncodedPass sent;
  sent.cache = 3;
  sent.zeroed = {5, 6};
  sent.batch = cache.prepare({{cache.add_sequence(), {7, 8, 9}}, {cache.add_sequence(), {10}}});
  sent.batch.experts_per_token = 2;
  sent.records_routing = sent.keeps_logits = true;
  sent.forced = torch::arange(2 * 4 * 3, torch::kInt32).view({2, 4, 3}) - 1;  // [L,T,n]
  sent.batch.rows_by_experts = {{1, torch::tensor({0, 2}, torch::kInt64)}, {2, torch::tensor({1, 3}, torch::kInt64)}};
  const auto words = encode_pass(sent);
  const EncodedPass got = decode_pass(words, torch::kCPU);
  EXPECT_EQ(got.cache, 3);
  EXPECT_EQ(got.zeroed, sent.zeroed);
  EXPECT_EQ(got.batch.experts_per_token, 2);
  EXPECT_TRUE(got.records_routing && got.keeps_logits);
  EXPECT_TRUE(same_bits(got.forced, sent.forced));
  const auto tensors = [](const Batch& batch) {
    return std::vector<torch::Tensor>{batch.input_ids,    batch.positions, batch.cu_seqlens, batch.offs,
                                      batch.slot_mapping, batch.kv_lens,   batch.page_table};
  };
  const auto expected = tensors(sent.batch), actual = tensors(got.batch);
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(torch::equal(actual[i], expected[i])) << i;
  ASSERT_EQ(got.batch.rows_by_experts.size(), 2);
  for (const auto& [experts, rows] : sent.batch.rows_by_experts)
    EXPECT_TRUE(torch::equal(got.batch.rows_by_experts.at(experts), rows));

  const EncodedPass without = decode_pass(encode_pass({-1, {}, packed_batch({{1, 2}}, torch::kCPU)}), torch::kCPU);
  EXPECT_FALSE(without.batch.page_table.defined());
  EXPECT_EQ(without.batch.cu_seqlens.numel(), 2);

  // Sizes that were wrong before the checksum was made.
  const std::string misfit = "a message of rank 0 has sizes that do not fit each other";
  auto shorter = words, longer = words;
  shorter.pop_back();
  longer.push_back(0);
  for (const auto& bad : {shorter, longer, std::vector<int64_t>{}})
    EXPECT_EQ(runtime_error_of([&] { decode_pass(bad, torch::kCPU); }), misfit);
}

// ---- the leader

// Rank 0 of a group in which nobody else computes: keeps the commands that the others would get.
class Recorder : public Communicator {
 public:
  explicit Recorder(int size) : size_(size), parts_(static_cast<size_t>(size)) {}
  int rank() const override { return 0; }
  int size() const override { return size_; }
  void exchange(const std::vector<Send>& sends, const std::vector<Receive>&) override {
    for (const auto& [tensor, to] : sends) parts_[static_cast<size_t>(to)].push_back(tensor.clone());
  }
  void keep_alive() noexcept override {}
  void fail(const std::string&) noexcept override {}
  uint64_t bytes_sent() const override { return 0; }

  // Since the last call, for one rank.
  std::vector<Command> commands(int rank) {
    std::vector<Command> all;
    last_ = std::exchange(parts_[static_cast<size_t>(rank)], {});
    for (const auto& part : last_)
      if (part.scalar_type() == torch::kInt64 && part.numel() == 6 && part.data_ptr<int64_t>()[0] == kMagic)
        all.push_back(static_cast<Command>(part.data_ptr<int64_t>()[2]));
    return all;
  }

  // Of the last of these commands.
  std::vector<int64_t> words() const {
    const torch::Tensor& words = last_.back();
    return {words.data_ptr<int64_t>(), words.data_ptr<int64_t>() + words.numel()};
  }

 private:
  static constexpr int64_t kMagic = 0x3147534d4c58494d;
  int size_;
  std::vector<std::vector<torch::Tensor>> parts_;
  std::vector<torch::Tensor> last_;
};

using Commands = std::vector<Command>;

TEST(Leader, CachesLiveOnTheOtherRanksAsLongAsHere) {
  const auto world = std::make_shared<Recorder>(2);
  Leader leader(world, Placement::of_rank(0, 2, 1, true));
  const auto run = [&](RollingKVCache& cache) {
    const Batch batch = cache.prepare({{cache.add_sequence(), {1}}});
    leader.finish(leader.start(batch, &cache), [] { return torch::Tensor(); });
    return world->commands(1);
  };
  auto first = std::make_unique<RollingKVCache>(tiny_config(), RollingKVCache::Options{4, 8, 8});
  EXPECT_EQ(run(*first), (Commands{Command::kMakeCache, Command::kForward}));
  RollingKVCache moved = std::move(*first);
  first.reset();
  EXPECT_EQ(run(moved), Commands{Command::kForward});
  {
    RollingKVCache second(tiny_config(), {4, 8, 8});
    EXPECT_EQ(run(second), (Commands{Command::kMakeCache, Command::kForward}));
  }
  EXPECT_EQ(run(moved), (Commands{Command::kDropCache, Command::kForward}));
  leader.ping();
  EXPECT_EQ(world->commands(1), Commands{Command::kPing});
  leader.stop();
  EXPECT_EQ(world->commands(1), Commands{Command::kStop});
  EXPECT_THROW(run(moved), RankError);
}

TEST(Leader, PagesThatBecameZeroDoSoOnTheOtherRanks) {
  const auto world = std::make_shared<Recorder>(2);
  Leader leader(world, Placement::of_rank(0, 1, 2, true));
  RollingKVCache cache(tiny_config(), {4, 8, 8});
  const auto zeroed = [&] {
    leader.start(cache.prepare({{cache.add_sequence(), {1}}}), &cache);
    world->commands(1);
    return decode_pass(world->words(), torch::kCPU).zeroed;
  };
  const int64_t bad = cache.add_sequence();
  cache.prepare({{bad, {1, 2, 3, 4, 5}}});
  EXPECT_EQ(zeroed(), std::vector<int64_t>{});
  cache.discard_sequence(bad);
  EXPECT_EQ(zeroed(), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(zeroed(), std::vector<int64_t>{});
}

// The other ranks of the last stage get a pass when it is finished: they may still compute the one before with rank 0.
TEST(Leader, StagesBeginWhenAPassIsStarted) {
  const auto world = std::make_shared<Recorder>(4);
  Leader leader(world, Placement::of_rank(0, 2, 2, true));
  const Batch batch = packed_batch({{1, 2}}, torch::kCPU);
  const Pass first = leader.start(batch, nullptr), second = leader.start(batch, nullptr);
  EXPECT_EQ(world->commands(1), Commands{});
  for (const int rank : {2, 3}) EXPECT_EQ(world->commands(rank), (Commands{Command::kForward, Command::kForward}));
  leader.finish(first, [] { return torch::Tensor(); });
  EXPECT_EQ(world->commands(1), Commands{Command::kForward});
  leader.finish(second, [] { return torch::Tensor(); });
  leader.logits(torch::zeros({1, 4}), [] { return torch::Tensor(); });
  EXPECT_EQ(world->commands(1), (Commands{Command::kForward, Command::kLogits}));
  EXPECT_EQ(world->commands(2), Commands{});
}

TEST(RollingKVCache, TellsWhichPagesBecameZero) {
  RollingKVCache cache(tiny_config(), {4, 8, 8}), other(tiny_config(), {4, 8, 8});
  const int64_t kept = cache.add_sequence(), bad = cache.add_sequence();
  cache.prepare({{kept, {1, 2}}, {bad, {1, 2, 3, 4, 5}}});
  for (auto* c : {&cache, &other})
    for (const int64_t layer : {0, 1}) c->keys(layer).fill_(1), c->values(layer).fill_(1);
  EXPECT_TRUE(cache.take_zeroed().empty());
  cache.discard_sequence(bad);
  const auto pages = cache.take_zeroed();
  EXPECT_EQ(pages.size(), 2);
  EXPECT_TRUE(cache.take_zeroed().empty());
  other.zero(pages);
  for (const int64_t layer : {0, 1}) {
    EXPECT_TRUE(torch::equal(other.keys(layer), cache.keys(layer)));
    EXPECT_TRUE(torch::equal(other.values(layer), cache.values(layer)));
    EXPECT_EQ(cache.keys(layer).eq(0).sum().item<int64_t>(), 2 * 4 * 2 * 12);
  }
  EXPECT_THROW(other.zero({8}), std::exception);
}

}  // namespace
}  // namespace mixtral
