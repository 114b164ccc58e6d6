#include "rank_description.h"

#include <torch/version.h>

#include <algorithm>
#include <array>
#include <cstdio>

#include "../io/hash64.h"
#include "../io/load_error.h"
#include "../model/libtorch.h"
#include "../model/ops.h"
#include "save.h"
#include "weights.h"

namespace mixtral {
namespace {

std::string hexadecimal(uint64_t number) {
  char text[20];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(number));
  return text;
}

// Of names, types and shapes of all tensors, and of some bytes of each.
std::string fingerprint(const std::vector<TensorFile>& files) {
  Hash64 hash;
  std::array<char, 256> bytes;
  for (const TensorFile& file : files) {
    for (const auto& [name, entry] : file.entries()) {
      hash.add(name + " " + entry.dtype + " " + shape_string(entry.shape) + "\n");
      const uint64_t size = entry.end - entry.begin, count = std::min<uint64_t>(size, bytes.size());
      for (const uint64_t from : {uint64_t{0}, (size - count) / 2, size - count}) {
        file.read(entry.begin + from, bytes.data(), count);
        hash.add(bytes.data(), count);
      }
    }
  }
  return hexadecimal(hash.value());
}

// Products whose bits depend on the order in which the kernels of this processor add.
std::string arithmetic() {
  const auto numbers = [](int64_t rows, int64_t cols, int64_t step) {
    return (torch::arange(rows * cols, torch::kInt64) * step % 1021)
        .to(torch::kFloat32)
        .sub(510)
        .div(511)
        .view({rows, cols});
  };
  const auto offs = torch::full({1}, 3, torch::kInt32);
  Hash64 hash;
  for (const auto type : {torch::kFloat32, torch::kBFloat16}) {
    const auto weight = numbers(32, 1024, 131).to(type).unsqueeze(0);
    const auto product = ops::grouped_gemm(numbers(3, 1024, 577).to(type), weight, offs).contiguous();
    hash.add(product.data_ptr(), product.nbytes());
  }
  return hexadecimal(hash.value());
}

}  // namespace

std::string rank_description(const Config& config, const Checkpoint& checkpoint, const WeightType& type,
                             const Placement& placement) {
  return std::string("build: mixtral " MIXTRAL_VERSION ", torch " TORCH_VERSION "\n") +
         "layout: --tensor-parallel-size " + std::to_string(placement.tensor_size) + " --pipeline-parallel-size " +
         std::to_string(placement.stages) + (placement.expert_parallel ? "" : " --no-expert-parallel") + "\n" +
         "weights in memory: " + type.name() + "\nweights in the files: " + fingerprint(checkpoint.files()) +
         "\nhow the processor adds (MIXTRAL_CPU_ISA): " + arithmetic() + "\n" + config_json(config);
}

}  // namespace mixtral
