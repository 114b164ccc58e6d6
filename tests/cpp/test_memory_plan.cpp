#include <gtest/gtest.h>

#include "checkpoint/memory_plan.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

// Free memory of a machine with that much on the CPU and on CUDA.
FreeMemory machine(double cpu_gib, double cuda_gib) {
  return [=](const std::string& device) { return static_cast<int64_t>((device == "cpu" ? cpu_gib : cuda_gib) * kGiB); };
}

std::string error_of(const Config& config, const std::string& dtype, const std::string& device,
                     const FreeMemory& free) {
  try {
    check_fits("the weights", config, parse_weight_type(dtype, config, device), device, free);
  } catch (const OutOfMemory& error) {
    return error.what();
  }
  return "";
}

TEST(MemoryPlan, CountsWeightsActivationsAndCache) {
  const Config config = mixtral_8x7b();
  const WeightType type = parse_weight_type("bfloat16", config, "cuda");
  const MemoryPlan plan = plan_memory(config, type, "cuda");
  EXPECT_NEAR(plan.weights, 2 * 46.7e9, 0.01 * 2 * 46.7e9);
  EXPECT_EQ(plan.loading, 0);  // nothing is packed on CUDA
  EXPECT_EQ(plan.unpacking, 0);
  EXPECT_EQ(plan.cache, 32768.0 * 32 * 2 * 8 * 128 * 2);
  EXPECT_EQ(plan.to_load(), plan.weights + plan.activations);
  // In a pass of twice the tokens, twice the activations; a window bounds the cache.
  EXPECT_EQ(plan_memory(config, type, "cuda", 0, 1024).activations, 2 * plan.activations);
  EXPECT_EQ(plan_memory(config, type, "cuda", 100).cached_tokens, 112);
  Config windowed = config;
  windowed.window = 4096;
  EXPECT_LT(plan_memory(windowed, type, "cuda").cached_tokens, 4096 + 512 + 32);
  // Rows of two experts of 14336 are wider than all of attention.
  EXPECT_EQ(plan.activations, 512.0 * 2 * (2 * 4096 + 2 * (2 * 4096 + 3 * 14336)));
}

TEST(MemoryPlan, QuantisedWeightsOnCudaNeedRoomToBeUnpacked) {
  const Config config = mixtral_8x7b();
  const WeightType type = parse_weight_type("int4", config, "cuda");
  const MemoryPlan cuda = plan_memory(config, type, "cuda"), cpu = plan_memory(config, type, "cpu");
  EXPECT_EQ(cuda.unpacking, 8.0 * 2 * 14336 * 4096 * 2);  // gate and up of all experts
  EXPECT_EQ(cpu.unpacking, 0);
  EXPECT_EQ(cuda.to_load(), cpu.to_load() + cuda.unpacking);
}

TEST(MemoryPlan, RanksShareWeightsAndCache) {
  const Config config = mixtral_8x7b();
  const WeightType type = parse_weight_type("bfloat16", config, "cuda");
  const MemoryPlan whole = plan_memory(config, type, "cuda");
  for (const bool expert_parallel : {true, false}) {
    for (const auto& [tensor_size, stages] : {std::pair(2, 1), std::pair(1, 2), std::pair(2, 2), std::pair(8, 4)}) {
      double weights = 0, cache = 0;
      for (int rank = 0; rank < tensor_size * stages; ++rank) {
        const Placement placement = Placement::of_rank(rank, tensor_size, stages, expert_parallel);
        const MemoryPlan plan = plan_memory(config, type, "cuda", 0, kChunkSize, placement);
        weights += plan.weights;
        cache += plan.cache;
        EXPECT_LE(plan.activations, whole.activations);
      }
      const double embeddings = 2.0 * 32000 * 4096;
      EXPECT_EQ(cache, whole.cache);
      // Every rank of a stage has the embeddings, the norms and the routers whole.
      EXPECT_GE(weights, whole.weights + (tensor_size - 1) * embeddings);
      EXPECT_LE(weights, whole.weights + (tensor_size - 1) * 1.2 * embeddings);
    }
  }
  // Each expert cut in two: half of gate, up and product.
  const MemoryPlan cut = plan_memory(config, type, "cuda", 0, kChunkSize, Placement::of_rank(0, 2, 1, false));
  EXPECT_EQ(cut.activations, 512.0 * 2 * (2 * 4096 + 2 * (2 * 4096 + 3 * 7168)));
}

TEST(MemoryPlan, ARankFitsWhereTheModelDoesNot) {
  const Config config = mixtral_8x7b();
  const auto check = [&](const std::string& dtype, const Placement& placement) {
    const WeightType type = parse_weight_type(dtype, config, "cuda", true, placement);
    check_fits("the weights", config, type, "cuda", machine(0, 79), placement);
  };
  EXPECT_THROW(check("bfloat16", {}), OutOfMemory);
  EXPECT_NO_THROW(check("bfloat16", Placement::of_rank(1, 2, 1, true)));
  EXPECT_NO_THROW(check("bfloat16", Placement::of_rank(1, 1, 2, true)));
  EXPECT_THROW(check("float32", Placement::of_rank(1, 2, 1, true)), OutOfMemory);
  EXPECT_NO_THROW(check("float32", Placement::of_rank(1, 2, 2, true)));
}

TEST(MemoryPlan, RanksOfOneHostMustFitTogether) {
  const std::vector<RankMemory> ranks = {{"a", 2 * kGiB}, {"b", 5 * kGiB}, {"a", 1 * kGiB}};
  const auto error = [&](size_t rank, double gib) -> std::string {
    try {
      check_fits_host("the weights", ranks, rank, gib * kGiB);
    } catch (const OutOfMemory& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(error(0, 3), "");
  EXPECT_EQ(error(2, 2.5), "the weights for ranks 0, 2, which share a host: needs 3.00 GiB on cpu, 2.50 GiB available");
  EXPECT_EQ(error(1, 1), "");  // alone: check_fits says what would fit
}

TEST(MemoryPlan, WhatFitsIsNoError) {
  const Config config = mixtral_8x7b();
  EXPECT_EQ(error_of(config, "bfloat16", "cuda", machine(0, 139)), "");
  EXPECT_EQ(error_of(config, "int4", "cpu", machine(27, 0)), "");
}

TEST(MemoryPlan, AnH100HasNoRoomForMixtralIn16Bits) {
  const Config config = mixtral_8x7b();
  const auto error = error_of(config, "bfloat16", "cuda", machine(120, 79));
  EXPECT_EQ(error.rfind("the weights: needs 87.", 0), 0u) << error;
  EXPECT_NE(error.find(" on cuda, 79.00 GiB available; bfloat16 weights "), std::string::npos) << error;
  EXPECT_NE(error.find("a cache of up to 4.00 GiB for a context of 32768"), std::string::npos) << error;
  EXPECT_NE(error.find("; what would fit: int8 ("), std::string::npos) << error;
  EXPECT_NE(error.find(", fp8 ("), std::string::npos) << error;
  EXPECT_NE(error.find(", int4 ("), std::string::npos) << error;
  EXPECT_NE(error.find(", bfloat16 on cpu (87."), std::string::npos) << error;
  EXPECT_NE(error.find("int8 on cpu ("), std::string::npos) << error;
  EXPECT_NE(error.find("fp8 on cpu ("), std::string::npos) << error;
  EXPECT_NE(error.find("int4 on cpu ("), std::string::npos) << error;
  EXPECT_EQ(error.find('\n'), std::string::npos);
}

TEST(MemoryPlan, SuggestsOnlyWhatIsSmallerFitsAndExists) {
  const Config config = mixtral_8x7b();
  EXPECT_NE(error_of(config, "float32", "cuda", machine(1, 139)).find("what would fit: bfloat16 (87."),
            std::string::npos);
  const auto small = error_of(config, "bfloat16", "cpu", machine(30, 0));
  EXPECT_EQ(small.find("int8"), std::string::npos) << small;
  EXPECT_EQ(small.find("fp8"), std::string::npos) << small;
  EXPECT_NE(small.find("what would fit: int4 ("), std::string::npos) << small;
  const auto none = error_of(config, "bfloat16", "cpu", machine(10, 0));
  EXPECT_NE(none.find("; no other dtype fits"), std::string::npos) << none;
  Config quantized = config;  // cannot become anything else
  quantized.quantization = "int8";
  const auto fixed = error_of(quantized, "auto", "cpu", machine(30, 0));
  EXPECT_NE(fixed.find("; no other dtype fits"), std::string::npos) << fixed;
}

}  // namespace
}  // namespace mixtral
