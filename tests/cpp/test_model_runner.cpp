// The page pool: how large it gets, and when.
#include <gtest/gtest.h>

#include "engine/model_runner.h"
#include "model/memory.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

ModelRunner make_runner(int64_t window, int64_t kv_memory = 0) {
  return ModelRunner(tiny_model(tiny_config(4, 2, window)),
                     {/*page_size=*/4, /*max_chunk=*/10, /*max_batch=*/8, kv_memory, /*cuda_graph=*/true});
}

TEST(ModelRunner, ARequestNeedsPagesForItsOwnChunks) {
  const ModelRunner full = make_runner(0), windowed = make_runner(8);
  EXPECT_EQ(full.pages_needed(13, 20), 9);
  EXPECT_EQ(windowed.pages_needed(100, 20), 6);  // ceil((7 + 10) / 4) + 1
  EXPECT_EQ(windowed.pages_needed(3, 200), 4);   // ceil((7 + 3) / 4) + 1
  EXPECT_EQ(windowed.pages_needed(3, 2), 2);
}

TEST(ModelRunner, ThePoolIsAsLargeAsWantedAtFirstAndGrowsByHalfUnderSequences) {
  ModelRunner runner = make_runner(0);
  EXPECT_EQ(runner.num_pages(), 0);
  runner.grow(5, 8);
  EXPECT_EQ(runner.num_pages(), 8);
  runner.grow(7, 7);
  EXPECT_EQ(runner.num_pages(), 8);
  runner.cache().add_sequence();
  runner.grow(9, 9);
  EXPECT_EQ(runner.num_pages(), 12);
  runner.grow(13, 30);
  EXPECT_EQ(runner.num_pages(), 30);
}

TEST(ModelRunner, APoolWithoutSequencesIsDroppedBeforeALargerOneIsMade) {
  ModelRunner runner = make_runner(0);
  runner.grow(8, 8);
  const auto sequence = runner.cache().add_sequence();
  runner.cache().remove_sequence(sequence);
  runner.grow(9, 9);
  EXPECT_EQ(runner.num_pages(), 9);  // copied, it would have grown by half
}

TEST(ModelRunner, ThePoolStaysWithinItsLimit) {
  const auto model = tiny_model(tiny_config(4, 2, 0));
  const int64_t page = RollingKVCache::page_bytes(model->config(), 4, model->dtype());
  ModelRunner runner = make_runner(0, 10 * page + page / 2);
  runner.grow(4, 100);
  EXPECT_EQ(runner.num_pages(), 10);
  EXPECT_THROW(runner.grow(11, 11), OutOfMemory);
  EXPECT_EQ(runner.num_pages(), 10);
}

TEST(ModelRunner, WantsThatMemoryCannotMeetShrinkButNeedsDoNot) {
  ModelRunner runner = make_runner(0);
  const int64_t too_many = int64_t{1} << 30;
  EXPECT_THROW(runner.grow(too_many, too_many), OutOfMemory);
  EXPECT_EQ(runner.num_pages(), 0);
}

}  // namespace
}  // namespace mixtral
