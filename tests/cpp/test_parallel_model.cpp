// A model that is split over ranks against the same model in one process: the bits are the same, unless experts are cut
// along their intermediate size.
#include <chrono>
#include <memory>
#include <random>
#include <thread>

#include "engine/routing_observer.h"
#include "engine/trace.h"
#include "model/observer.h"
#include "split_model.h"

namespace mixtral {
namespace {

using Ids = std::vector<int64_t>;

// Eight sequences of different lengths.
std::vector<Ids> prompts(int64_t vocab) {
  std::vector<Ids> ids;
  for (const int64_t length : {17, 1, 9, 30, 2, 8, 5, 12})
    ids.push_back(random_ids(length, vocab, static_cast<uint64_t>(length)));
  return ids;
}

torch::Tensor without_a_cache(Mixtral& model) {
  return model->logits(model->hidden_states(packed_batch(prompts(model->config().vocab_size), torch::kCPU)));
}

// Chunks of up to 7 tokens of sequences that join one by one, beside single tokens of those that are further on:
// batches of 1 to 8 sequences. -> the logits of all passes, [tokens,vocab]
torch::Tensor through_a_cache(Mixtral& model, int64_t experts_per_token = 0) {
  const auto all = prompts(model->config().vocab_size);
  RollingKVCache cache(model->cache_config(), {4, 64, 7, torch::kCPU, model->dtype()});
  std::vector<int64_t> sequences;
  std::vector<torch::Tensor> logits;
  for (bool more = true; more;) {
    if (sequences.size() < all.size()) sequences.push_back(cache.add_sequence());
    std::vector<RollingKVCache::Chunk> chunks;
    for (size_t i = 0; i < sequences.size(); ++i) {
      const auto done = cache.length(sequences[i]), left = static_cast<int64_t>(all[i].size()) - done;
      if (left == 0) continue;
      const auto first = all[i].begin() + done;
      chunks.push_back({sequences[i], {first, first + std::min<int64_t>(left, done < 14 ? 7 : 1)}});
    }
    more = sequences.size() < all.size() || !chunks.empty();
    if (chunks.empty()) continue;
    Batch batch = cache.prepare(chunks);
    batch.experts_per_token = experts_per_token;
    logits.push_back(model->logits(model->hidden_states(batch, &cache)));
  }
  return torch::cat(logits);
}

Mixtral whole_model(const Mixtral& plain, Packing packing) {
  return packing == Packing::kNone ? plain : packed_model(plain, packing);
}

void expect_same_bits(const Config& config, Layout layout, torch::ScalarType dtype, Packing packing = Packing::kNone) {
  const auto plain = tiny_model(config, dtype);
  auto whole = whole_model(plain, packing);
  SplitModel split(plain, layout, packing);
  EXPECT_TRUE(same_bits(through_a_cache(split.leader()), through_a_cache(whole))) << layout.name();
  EXPECT_TRUE(same_bits(without_a_cache(split.leader()), without_a_cache(whole))) << layout.name();
  for (const std::string& error : split.stop()) EXPECT_EQ(error, "");
}

// ---- the same bits

class EveryLayout : public ::testing::TestWithParam<Layout> {};
INSTANTIATE_TEST_SUITE_P(ParallelModel, EveryLayout,
                         ::testing::Values(Layout{2, 1}, Layout{4, 1}, Layout{8, 1}, Layout{1, 2}, Layout{1, 3},
                                           Layout{1, 4}, Layout{2, 2}),
                         [](const auto& info) { return info.param.name(); });

TEST_P(EveryLayout, HasTheBitsOfOneProcess) {
  for (const int64_t window : {0, 8})
    for (const auto dtype : {torch::kFloat32, torch::kBFloat16})
      expect_same_bits(splittable_config(8, window), GetParam(), dtype);
}

TEST_P(EveryLayout, HasTheBitsOfOneProcessInADenseModel) {
  expect_same_bits(splittable_config(0), GetParam(), torch::kBFloat16);
}

TEST_P(EveryLayout, HasTheBitsOfOneProcessWithTiedEmbeddings) {
  Config config = splittable_config();
  config.tie_word_embeddings = true;
  expect_same_bits(config, GetParam(), torch::kFloat32);
}

TEST_P(EveryLayout, HasTheBitsOfOneProcessWithFewKvHeads) {
  Config config = splittable_config();
  config.num_kv_heads = 1;
  expect_same_bits(config, GetParam(), torch::kBFloat16);
}

class EveryPacking : public ::testing::TestWithParam<Packing> {};
const char* const kNamesOfPackings[] = {"None", "Float", "Int8", "Fp8", "Int4"};
INSTANTIATE_TEST_SUITE_P(ParallelModel, EveryPacking,
                         ::testing::Values(Packing::kFloat, Packing::kInt8, Packing::kFp8, Packing::kInt4),
                         [](const auto& info) { return kNamesOfPackings[static_cast<size_t>(info.param)]; });

TEST_P(EveryPacking, HasTheBitsOfOneProcess) {
  for (const Layout layout : {Layout{2, 1}, Layout{4, 1}, Layout{1, 2}, Layout{2, 2}}) {
    expect_same_bits(splittable_config(8), layout, torch::kBFloat16, GetParam());
    expect_same_bits(splittable_config(0, 0), layout, torch::kBFloat16, GetParam());
  }
}

TEST(ParallelModel, ThreadsDoNotChangeABit) {
  const auto plain = tiny_model(splittable_config(), torch::kBFloat16);
  auto whole = plain;
  const int threads = num_threads();
  for (const int count : {1, 2}) {
    use_threads(count);
    for (const Layout layout : {Layout{2, 1}, Layout{1, 2}}) {
      SplitModel split(plain, layout);
      EXPECT_TRUE(same_bits(through_a_cache(split.leader()), through_a_cache(whole))) << count;
    }
  }
  use_threads(threads);
}

TEST(ParallelModel, AVocabularyThatCannotBeCutStaysWhole) {
  Config config = splittable_config();
  config.vocab_size = 101;
  expect_same_bits(config, {2, 1}, torch::kFloat32);
}

TEST(ParallelModel, ModelOfTokenIds) {
  const auto plain = tiny_model(splittable_config());
  auto whole = plain;
  SplitModel split(plain, {2, 2});
  const auto ids = torch::tensor(random_ids(12, 256, 1), torch::kInt64).view({3, 4});
  EXPECT_TRUE(same_bits(split.leader()->forward(ids), whole->forward(ids)));
  EXPECT_EQ(split.leader()->forward(ids.narrow(1, 0, 0)).sizes(), (std::vector<int64_t>{3, 0, 256}));
  EXPECT_THROW(split.leader()->forward(ids + 250), std::invalid_argument);  // and nobody else has noticed
  EXPECT_THROW(split.leader()->hidden_states(packed_batch({{1, 300}}, torch::kCPU)), std::invalid_argument);
  EXPECT_TRUE(same_bits(split.leader()->forward(ids), whole->forward(ids)));
}

// ---- experts

TEST(ParallelModel, AllTokensToTheExpertsOfOneRank) {
  Config config = splittable_config();
  config.select_bias = true;
  for (const int64_t first : {0, 6}) {
    const auto plain = tiny_model(config);
    for (auto& item : plain->named_parameters())
      if (item.value().dim() == 1 && item.value().size(0) == 8) item.value().narrow(0, first, 2).fill_(100);
    auto whole = plain;
    SplitModel split(plain, {4, 1});
    EXPECT_TRUE(same_bits(through_a_cache(split.leader()), through_a_cache(whole)));
  }
}

TEST(ParallelModel, OtherNumbersOfExperts) {
  const auto plain = tiny_model(splittable_config());
  auto whole = plain;
  SplitModel split(plain, {2, 2});
  for (const int64_t k : {1, 3, 8})
    EXPECT_TRUE(same_bits(through_a_cache(split.leader(), k), through_a_cache(whole, k))) << k;
  Batch batch = packed_batch({random_ids(5, 256, 1)}, torch::kCPU);
  batch.rows_by_experts = {{1, torch::tensor({0, 3}, torch::kInt64)},
                           {2, torch::tensor({1}, torch::kInt64)},
                           {4, torch::tensor({2, 4}, torch::kInt64)}};
  EXPECT_TRUE(same_bits(split.leader()->hidden_states(batch), whole->hidden_states(batch)));
}

Routing random_routing(const Config& config, int64_t tokens) {
  Routing routing;
  routing.layers = config.num_layers;
  routing.top_k = 2;
  routing.experts = config.num_experts;
  std::mt19937 random(1);
  for (int64_t i = 0; i < tokens * config.num_layers; ++i) {
    const auto first = static_cast<uint8_t>(random() % 8);
    routing.topk_ids.insert(routing.topk_ids.end(), {first, static_cast<uint8_t>((first + 1 + random() % 7) % 8)});
  }
  return routing;
}

TEST_P(EveryLayout, ForcesAndTracesTheRoutingAsOneProcess) {
  const Config config = splittable_config();
  const auto plain = tiny_model(config, torch::kBFloat16);
  auto whole = plain;
  SplitModel split(plain, GetParam());
  const Routing forced = random_routing(config, 9);
  const auto run = [&](Mixtral& model, bool force) {
    RoutingObserver observer(config, /*keep_logits=*/true);
    if (force) observer.force(forced, 0, 9);
    Batch batch = packed_batch({random_ids(9, 256, 2)}, torch::kCPU);
    batch.routing = &observer;
    const auto hidden = model->hidden_states(batch);
    Routing traced = empty_trace(config, 2).routing;
    observer.append_to(traced, 0, 9);
    return std::make_pair(hidden, traced);
  };
  for (const bool force : {false, true}) {
    const auto [hidden, traced] = run(split.leader(), force);
    const auto [expected, expected_trace] = run(whole, force);
    EXPECT_TRUE(same_bits(hidden, expected));
    EXPECT_EQ(traced.topk_ids, expected_trace.topk_ids);
    EXPECT_EQ(traced.topk_weights, expected_trace.topk_weights);
    EXPECT_EQ(traced.router_logits, expected_trace.router_logits);
    EXPECT_EQ(traced.next_gate_ids, expected_trace.next_gate_ids);
    EXPECT_EQ(traced.next_gate_ids.size(), 9u * 3 * 2);
    EXPECT_EQ(traced.topk_ids == forced.topk_ids, force);
  }
  for (const std::string& error : split.stop()) EXPECT_EQ(error, "");
}

// Several passes in flight, some of which are recorded.
TEST(ParallelModel, RoutingOfPassesThatOverlapIsKeptApart) {
  const Config config = splittable_config();
  const auto plain = tiny_model(config);
  auto whole = plain;
  SplitModel split(plain, {2, 2});
  const auto batch_of = [&](int64_t i) { return packed_batch({random_ids(5 + i, 256, i)}, torch::kCPU); };
  std::vector<std::unique_ptr<RoutingObserver>> observers;
  std::vector<Pass> passes;
  for (int64_t i = 0; i < 6; ++i) {
    observers.push_back(std::make_unique<RoutingObserver>(config, /*keep_logits=*/i % 2 == 1));
    Batch batch = batch_of(i);
    if (i % 3 != 0) batch.routing = observers.back().get();
    passes.push_back(split.leader()->start(batch));
  }
  for (int64_t i = 0; i < 6; ++i) {
    RoutingObserver observer(config, /*keep_logits=*/true);
    Batch batch = batch_of(i);
    batch.routing = &observer;
    EXPECT_TRUE(same_bits(split.leader()->finish(passes[static_cast<size_t>(i)]), whole->hidden_states(batch)));
    if (i % 3 == 0) continue;
    Routing traced = empty_trace(config, 2).routing, expected = traced;
    observers[static_cast<size_t>(i)]->append_to(traced, 0, 5 + i);
    observer.append_to(expected, 0, 5 + i);
    EXPECT_EQ(traced.topk_ids, expected.topk_ids) << i;
    EXPECT_EQ(traced.topk_weights, expected.topk_weights) << i;
  }
}

TEST_P(EveryLayout, HasTheFingerprintOfOneProcess) {
  Config config = splittable_config();
  for (const bool tied : {false, true}) {
    config.tie_word_embeddings = tied;
    config.num_kv_heads = tied ? 1 : 4;  // which several ranks hold
    for (const Packing packing : {Packing::kNone, Packing::kInt4}) {
      if (packing != Packing::kNone && GetParam().tensor_size > 4) continue;  // blocks of 32 rows are not cut
      const auto plain = tiny_model(config, torch::kBFloat16);
      SplitModel split(plain, GetParam(), packing);
      EXPECT_EQ(trace_fingerprint(*split.leader()), trace_fingerprint(*whole_model(plain, packing))) << tied;
    }
  }
}

TEST(ParallelModel, CutExpertsHaveTheFingerprintOfOneProcess) {
  for (const Packing packing : {Packing::kNone, Packing::kFloat, Packing::kInt8, Packing::kFp8, Packing::kInt4}) {
    const auto plain = tiny_model(splittable_config(), torch::kBFloat16);
    for (const Layout layout : {Layout{2, 1, false}, Layout{2, 2, false}}) {
      SplitModel split(plain, layout, packing);
      EXPECT_EQ(trace_fingerprint(*split.leader()), trace_fingerprint(*whole_model(plain, packing)));
    }
  }
}

TEST(ParallelModel, AFingerprintIsOfTheWeightsOfAllRanks) {
  const auto plain = tiny_model(splittable_config());
  const std::string before = trace_fingerprint(*plain);
  for (auto& item : plain->named_parameters()) {
    const torch::NoGradGuard no_grad;
    item.value().add_(1);
    EXPECT_NE(trace_fingerprint(*plain), before) << item.key();
    for (const bool whole_experts : {true, false}) {
      SplitModel split(plain, {2, 2, whole_experts});
      EXPECT_EQ(trace_fingerprint(*split.leader()), trace_fingerprint(*plain)) << item.key() << whole_experts;
    }
    item.value().sub_(1);
  }
}

// ---- Megatron-LM's layout

TEST(ParallelModel, CutExpertsGiveNearlyTheSame) {
  for (const int64_t experts : {8, 0})
    for (const Layout layout : {Layout{2, 1, false}, Layout{4, 1, false}, Layout{2, 2, false}}) {
      const auto plain = tiny_model(splittable_config(experts));
      auto whole = plain;
      SplitModel split(plain, layout);
      const auto expected = through_a_cache(whole), logits = through_a_cache(split.leader());
      const double scale = expected.abs().max().item<double>();
      EXPECT_LT((logits - expected).abs().max().item<double>(), 1e-5 * scale) << layout.name() << experts;
      for (const std::string& error : split.stop()) EXPECT_EQ(error, "");
    }
}

// ---- pipelines

TEST(ParallelModel, PassesOverlapInAPipeline) {
  Config config = splittable_config(8, /*window=*/0);
  const auto plain = tiny_model(config);
  auto whole = plain;
  for (const Layout layout : {Layout{1, 2}, Layout{2, 2}, Layout{1, 4}}) {
    SplitModel split(plain, layout);
    // Hidden states that no buffer between two ranks holds, and a page table as long.
    constexpr int64_t kTokens = 700, kSequences = 6;
    const auto run = [&](Mixtral& model, int64_t depth) {
      RollingKVCache cache(model->cache_config(),
                           {1, kSequences * (kTokens + 2), kTokens, torch::kCPU, model->dtype()});
      std::vector<Pass> started;
      std::vector<torch::Tensor> hidden;
      const auto finish_first = [&] {
        hidden.push_back(model->finish(started.front()));
        started.erase(started.begin());
      };
      std::vector<int64_t> sequences;
      for (int64_t i = 0; i < kSequences; ++i) sequences.push_back(cache.add_sequence());
      for (const int64_t tokens : {kTokens, int64_t{1}})
        for (int64_t i = 0; i < kSequences; ++i) {
          if (static_cast<int64_t>(started.size()) == depth) finish_first();
          const auto ids = random_ids(tokens, config.vocab_size, static_cast<uint64_t>(i + tokens));
          started.push_back(model->start(cache.prepare({{sequences[static_cast<size_t>(i)], ids}}), &cache));
        }
      while (!started.empty()) finish_first();
      return torch::cat(hidden);
    };
    EXPECT_TRUE(same_bits(run(split.leader(), layout.stages), run(whole, 1))) << layout.name();
    for (const std::string& error : split.stop()) EXPECT_EQ(error, "");
  }
}

TEST(ParallelModel, SeveralThreadsMayCallIt) {
  const auto plain = tiny_model(splittable_config());
  auto whole = plain;
  SplitModel split(plain, {2, 2});
  const auto expected = without_a_cache(whole);
  std::vector<torch::Tensor> results(3);
  std::vector<std::thread> threads;
  for (auto& result : results)
    threads.emplace_back([&] {
      for (int i = 0; i < 3; ++i) result = without_a_cache(split.leader());
    });
  for (int i = 0; i < 20; ++i) split.leader()->ping();
  for (auto& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_TRUE(same_bits(result, expected));
}

// Stages compute in the order of start(), so a thread whose pass is second waits for the one whose pass is first.
TEST(ParallelModel, PassesOfTwoThreadsAreFinishedInOrder) {
  const auto plain = tiny_model(splittable_config());
  auto whole = plain;
  SplitModel split(plain, {1, 2});
  const Batch first = packed_batch({random_ids(6, 256, 1)}, torch::kCPU);
  const Batch second = packed_batch({random_ids(6, 256, 2)}, torch::kCPU);
  const Pass first_pass = split.leader()->start(first), second_pass = split.leader()->start(second);
  torch::Tensor second_result;
  std::thread other([&] { second_result = split.leader()->finish(second_pass); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_TRUE(same_bits(split.leader()->finish(first_pass), whole->hidden_states(first)));
  other.join();
  EXPECT_TRUE(same_bits(second_result, whole->hidden_states(second)));
}

// ---- bytes

// That all ranks send for each token of a pass, in values, beyond those of a model of half as many layers.
double values_sent_by_two_layers(Config config, Layout layout) {
  std::vector<uint64_t> bytes;
  constexpr int64_t kTokens = 11;
  for (const int64_t layers : {2, 4}) {
    config.num_layers = layers;
    SplitModel split(tiny_model(config), layout);
    split.leader()->hidden_states(packed_batch({random_ids(kTokens, config.vocab_size, 1)}, torch::kCPU));
    split.stop();
    uint64_t sent = 0;
    for (int rank = 0; rank < layout.ranks(); ++rank) sent += split.rank(static_cast<size_t>(rank)).bytes_sent();
    bytes.push_back(sent);
  }
  return static_cast<double>(bytes[1] - bytes[0]) / sizeof(float) / kTokens;
}

// Megatron-LM Shoeybi et al. (2019), section 3, counts two sums of H values; these layouts gather columns instead.
TEST(ParallelModel, BytesOfEachLayout) {
  for (const int n : {2, 4}) {
    // A rank sends what it has to n - 1 others, so all of them together send n - 1 times the whole.
    const Config moe = splittable_config(8), dense = splittable_config(0);
    const int64_t H = moe.hidden_size, I = moe.intermediate_size, heads = moe.num_heads * moe.head_dim, k = moe.top_k;
    EXPECT_EQ(values_sent_by_two_layers(moe, {n, 1}), 2 * (n - 1) * (heads + H + k * H)) << n;
    EXPECT_EQ(values_sent_by_two_layers(dense, {n, 1}), 2 * (n - 1) * (heads + H + I + H)) << n;
    // Every rank sends its whole part of the sum.
    EXPECT_EQ(values_sent_by_two_layers(moe, {n, 1, false}), 2 * (n - 1) * (heads + H + n * H)) << n;
  }
  EXPECT_EQ(values_sent_by_two_layers(splittable_config(), {1, 2}), 0);  // a hop costs the same whatever the layers
}

TEST(ParallelModel, BytesOfAHop) {
  const Config config = splittable_config();
  SplitModel split(tiny_model(config, torch::kBFloat16), {1, 2});
  split.leader()->hidden_states(packed_batch({random_ids(11, config.vocab_size, 1)}, torch::kCPU));
  EXPECT_EQ(split.rank(1).bytes_sent(), 11 * config.hidden_size * 2);
}

// ---- what goes wrong

template <typename Error, typename Call>
std::string split_error_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(ParallelModel, RankZeroSaysWhatFailedElsewhere) {
  SplitModel split(tiny_model(splittable_config()), {1, 2});
  RollingKVCache cache(split.leader()->cache_config(), {4, 8, 8, torch::kCPU, torch::kFloat32});
  Batch batch = cache.prepare({{cache.add_sequence(), {1, 2, 3}}});
  batch.slot_mapping.fill_(1000);
  const auto call = [&] { split.leader()->hidden_states(batch, &cache); };
  const std::string error = split_error_of<RankError>(call);
  EXPECT_EQ(error.find("rank 1 failed: rolling_kv_cache_rope_write: "), 0) << error;
  EXPECT_EQ(split_error_of<RankError>(call), error);  // for good
}

TEST(ParallelModel, ErrorsOfOneRankEndAll) {
  const auto plain = tiny_model(splittable_config());
  for (const Layout layout : {Layout{2, 1}, Layout{1, 2}, Layout{2, 2}}) {
    SplitModel split(plain, layout);
    RollingKVCache cache(split.leader()->cache_config(), {4, 8, 8, torch::kCPU, torch::kFloat32});
    const int64_t sequence = cache.add_sequence();
    Batch batch = cache.prepare({{sequence, {1, 2, 3}}});
    batch.slot_mapping.fill_(1000);
    EXPECT_THROW(split.leader()->hidden_states(batch, &cache), RankError);
    EXPECT_THROW(split.leader()->hidden_states(packed_batch({{1}}, torch::kCPU)), RankError);
    EXPECT_THROW(split.leader()->ping(), RankError);
    const auto errors = split.stop();
    for (size_t rank = 1; rank < errors.size(); ++rank) EXPECT_NE(errors[rank], "") << rank;
  }
}

TEST(ParallelModel, RefusesWhatASplitModelCannotDo) {
  const Config config = splittable_config();
  SplitModel split(tiny_model(config), {1, 2});
  ForwardObserver observer;
  Batch batch = packed_batch({{1, 2}}, torch::kCPU);
  batch.observer = &observer;
  EXPECT_EQ(split_error_of<std::invalid_argument>([&] { split.leader()->hidden_states(batch); }),
            "an observer: needs the whole model in one process, this one is split over 2 ranks");
  EXPECT_EQ(split_error_of<std::invalid_argument>([&] { split.leader()->require_whole("calibrate"); }),
            "calibrate: needs the whole model in one process, this one is split over 2 ranks");
  EXPECT_THROW(split.leader()->init_random(1), std::invalid_argument);
  const auto group = shm_group(2, 5);
  EXPECT_EQ(split_error_of<std::invalid_argument>([&] {
              Mixtral(config, torch::kFloat32, torch::kCPU, Packing::kNone, Placement::of_rank(1, 2, 1, true),
                      group[0]);
            }),
            "the model is placed on rank 1 of 2, this process is rank 0 of 2");
  Mixtral part(config, torch::kFloat32, torch::kCPU, Packing::kNone, Placement::of_rank(1, 2, 1, true));
  EXPECT_THROW(part->hidden_states(packed_batch({{1}}, torch::kCPU)), std::logic_error);
  EXPECT_THROW(follow(*part), std::logic_error);
}

}  // namespace
}  // namespace mixtral
