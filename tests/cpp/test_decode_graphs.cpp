// Padding, buckets and buffers of decoding in graphs, on the CPU, where every step runs without one.
#include <set>

#include "engine/decode_graphs.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

using Chunks = std::vector<RollingKVCache::Chunk>;

// A cache in which `sequences` sequences of unequal lengths have been read.
struct Prefilled {
  Prefilled(Mixtral& model, int64_t sequences, int64_t page_size)
      : cache(model->config(),
              {page_size, 400, 64, torch::kCPU, model->dtype(), DecodeGraphs::padding_tokens(sequences)}) {
    Chunks chunks;
    for (int64_t b = 0; b < sequences; ++b)
      chunks.push_back({cache.add_sequence(), random_ids(1 + 7 * b % 30, model->config().vocab_size, 50 + b)});
    model->hidden_states(cache.prepare(chunks), &cache);
    for (auto& chunk : chunks) ids.push_back(chunk.sequence);
  }
  // Any token for each of the first `sequences` sequences.
  Chunks step(int64_t sequences, int64_t number) const {
    Chunks chunks;
    for (int64_t b = 0; b < sequences; ++b) chunks.push_back({ids[b], {(13 * number + 5 * b) % 100}});
    return chunks;
  }
  RollingKVCache cache;
  std::vector<int64_t> ids;
};

TEST(DecodeGraphs, PaddedStepsHaveTheBitsOfPlainOnes) {
  const auto packable = tiny_model(packable_config(4, 2, 0), torch::kBFloat16);
  for (auto& model :
       {tiny_model(tiny_config(4, 2, 8)), tiny_model(tiny_config(0, 0, 0)), packed_model(packable, Packing::kFloat)})
    for (const int64_t sequences : {1, 2, 3, 5, 8, 9})
      for (const int64_t page_size : {1, 4}) {
        Mixtral shared = model;
        Prefilled plain(shared, sequences, page_size), padded(shared, sequences, page_size);
        DecodeGraphs graphs(*shared, padded.cache);
        for (int64_t number = 0; number < 12; ++number) {
          const int64_t running = number < 8 ? sequences : (sequences + 1) / 2;  // others have finished
          const auto step = plain.step(running, number);
          const auto expected = shared->logits(shared->hidden_states(plain.cache.prepare(step), &plain.cache));
          ASSERT_TRUE(same_bits(graphs.logits(step), expected)) << sequences << " sequences, step " << number;
        }
      }
}

TEST(DecodeGraphs, PaddingKeysGoBehindThePool) {
  auto model = tiny_model(tiny_config());
  Prefilled run(model, 5, 4);
  HostBatch batch = run.cache.lay_out(run.step(5, 0));
  batch.pad(8, run.cache.padding_slot());
  EXPECT_EQ(batch.sequences(), 8);
  EXPECT_EQ(batch.cu_seqlens, (std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6, 7, 8}));
  EXPECT_EQ(batch.slot_mapping[5], 400 * 4);
  EXPECT_EQ(std::set<int64_t>(batch.slot_mapping.begin(), batch.slot_mapping.end()).size(), 8u);
  EXPECT_LT(batch.slot_mapping[7], run.cache.keys(0).size(0) * run.cache.keys(0).size(1));
  for (size_t row = 5; row < 8; ++row) {
    EXPECT_EQ(batch.input_ids[row], batch.input_ids[0]);
    EXPECT_EQ(batch.positions[row], batch.positions[0]);
    EXPECT_EQ(batch.kv_lens[row], batch.kv_lens[0]);
  }
  EXPECT_EQ(batch.page_table.size(), static_cast<size_t>(8 * batch.columns));
}

TEST(DecodeGraphs, RoomForPaddingIsEnoughForEveryBatchAndNoMore) {
  for (int64_t most = 1; most <= 2 * DecodeGraphs::kMaxSequences; ++most) {
    int64_t needed = 0;
    for (int64_t sequences = 1; sequences <= std::min(most, DecodeGraphs::kMaxSequences); ++sequences)
      needed = std::max(needed, round_up_to_power_of_two(sequences) - sequences);
    EXPECT_GE(DecodeGraphs::padding_tokens(most), needed);
    EXPECT_LE(DecodeGraphs::padding_tokens(most), needed + 1);
  }
}

TEST(BatchBuffer, StaysWhereItIsWhenItIsFilledAgain) {
  auto model = tiny_model(tiny_config());
  Prefilled run(model, 3, 4);
  const HostBatch first = run.cache.lay_out(run.step(3, 0)), second = run.cache.lay_out(run.step(3, 1));
  ASSERT_EQ(first.columns, second.columns);
  BatchBuffer buffer(3, 3, first.columns, torch::kCPU);
  buffer.fill(first);
  const Batch views = buffer.batch();
  buffer.fill(second);
  const Batch expected = second.to(torch::kCPU);
  const auto parts = [](const Batch& b) {
    return std::vector<torch::Tensor>{b.input_ids,    b.positions,  b.cu_seqlens, b.offs,
                                      b.slot_mapping, b.page_table, b.kv_lens};
  };
  for (size_t i = 0; i < parts(views).size(); ++i) EXPECT_TRUE(torch::equal(parts(views)[i], parts(expected)[i])) << i;
  EXPECT_EQ(views.offs.item<int64_t>(), 3);
  EXPECT_FALSE(torch::equal(views.positions, first.to(torch::kCPU).positions));
}

}  // namespace
}  // namespace mixtral
