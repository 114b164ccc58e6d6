#include <gtest/gtest.h>

#include "checkpoint/mapped_plan.h"
#include "checkpoint_files.h"
#include "io/disk_bandwidth.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

MappedPlan plan(const std::string& dtype, double free, const Bandwidths& bandwidths) {
  const Config config = mixtral_8x7b();
  const WeightType type = parse_weight_type(dtype, config);
  return plan_mapped(config, type, plan_memory(config, type, "cpu", /*ctx_size=*/4096), free, bandwidths);
}

TEST(MappedPlan, CountsTheBytesOfAToken) {
  const MappedPlan all = plan("bfloat16", 200 * kGiB, {2e9, 16e9});
  const double expert = 3.0 * 4096 * 14336 * 2, attention = 2.0 * (4096 + 1024) * 4096 * 2, head = 32000.0 * 4096 * 2;
  EXPECT_EQ(all.experts, 32 * 8 * expert);
  EXPECT_EQ(all.experts_per_token, 32 * 2 * expert);
  EXPECT_NEAR(all.always, 32 * attention + head, 0.01 * all.always);
  EXPECT_NEAR(all.mapped, all.always + all.experts + head, 0.01 * all.mapped);
}

TEST(MappedPlan, WithRoomForAllMemoryAloneIsTheLimit) {
  const MappedPlan all = plan("bfloat16", 200 * kGiB, {2e9, 16e9});
  EXPECT_EQ(all.resident_share, 1);
  EXPECT_DOUBLE_EQ(all.tokens_per_second, 16e9 / (all.always + all.experts_per_token));
  EXPECT_EQ(plan("bfloat16", 200 * kGiB, {0, 16e9}).tokens_per_second, all.tokens_per_second);
}

TEST(MappedPlan, ExpertsThatAreNotInMemoryComeFromTheDisk) {
  const MappedPlan none = plan("bfloat16", 0, {2e9, 16e9}), half = plan("bfloat16", 46 * kGiB, {2e9, 16e9});
  EXPECT_EQ(none.resident_share, 0);
  EXPECT_DOUBLE_EQ(1 / none.tokens_per_second,
                   (none.always + none.experts_per_token) / 16e9 + none.experts_per_token / 2e9);
  EXPECT_NEAR(half.resident_share, 0.5, 0.02);
  EXPECT_GT(half.tokens_per_second, 1.8 * none.tokens_per_second);
  EXPECT_GT(plan("int4", 46 * kGiB, {2e9, 16e9}).tokens_per_second, 5 * half.tokens_per_second);
  EXPECT_EQ(plan("bfloat16", 46 * kGiB, {0, 16e9}).tokens_per_second, 0);
}

TEST(MappedPlan, ADenseModelHasNoExpertsToLeaveOut) {
  const Config config = packable_config(/*num_experts=*/0);
  const WeightType type = parse_weight_type("float32", config);
  const MemoryPlan memory = plan_memory(config, type, "cpu", 64);
  const MappedPlan dense = plan_mapped(config, type, memory, kGiB, {1e9, 16e9});
  EXPECT_EQ(dense.experts, 0);
  EXPECT_DOUBLE_EQ(dense.tokens_per_second, 16e9 / dense.always);
}

TEST(DiskBandwidth, IsUnknownForWhatIsNotThereOrTooShort) {
  const testing::TempFolder folder;
  testing::write_file(folder / "short", std::string(1 << 20, 'x'));
  EXPECT_EQ(disk_bandwidth(folder / "short"), 0);
  EXPECT_EQ(disk_bandwidth(folder / "missing"), 0);
}

}  // namespace
}  // namespace mixtral
