// Random tensors of a checkpoint, and the file that holds them.
#pragma once

#include <map>
#include <string>

#include "checkpoint/weight_names.h"
#include "checkpoint_files.h"
#include "model/libtorch.h"

namespace mixtral::testing {

using Tensors = std::map<std::string, torch::Tensor>;

struct Sizes {
  int64_t hidden = 8, intermediate = 5, head_dim = 4, vocab = 11;
};

// Two layers of four query heads and two key/value heads; no experts: dense.
inline Config checkpoint_config(int64_t num_experts, const Sizes& sizes = {}) {
  Config config;
  config.hidden_size = sizes.hidden;
  config.intermediate_size = sizes.intermediate;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = sizes.head_dim;
  config.vocab_size = sizes.vocab;
  config.max_position = 64;
  config.num_experts = num_experts;
  config.top_k = num_experts ? 2 : 0;
  config.rms_norm_eps = 1e-5;
  config.rope_theta = 1e4;
  config.validate("test");
  return config;
}

// Random tensors of the given spelling; equal names always hold equal values.
inline Tensors random_tensors(const Config& config, WeightNames names, torch::ScalarType type) {
  Tensors tensors;
  for (const WeightSlice& slice : weight_slices(config, names)) {
    torch::manual_seed(std::hash<std::string>()(slice.tensor) & 0xffff);
    tensors[slice.tensor] = torch::randn(slice.shape).to(type);
  }
  return tensors;
}

inline std::string file_bytes(const Tensors& tensors) {
  const std::map<torch::ScalarType, std::string> names = {{torch::kFloat32, "F32"},
                                                          {torch::kBFloat16, "BF16"},
                                                          {torch::kHalf, "F16"},
                                                          {torch::kInt64, "I64"},
                                                          {torch::kInt8, "I8"},
                                                          {torch::kUInt8, "U8"},
                                                          {torch::kFloat8_e4m3fn, "F8_E4M3"}};
  std::string header, data;
  for (const auto& [name, tensor] : tensors) {
    std::string shape;
    for (const int64_t size : tensor.sizes()) shape += (shape.empty() ? "" : ",") + std::to_string(size);
    const std::string begin = std::to_string(data.size());
    data.append(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
    header += (header.empty() ? "{\"" : ",\"") + name + R"(":{"dtype":")" + names.at(tensor.scalar_type()) +
              R"(","shape":[)" + shape + R"(],"data_offsets":[)" + begin + "," + std::to_string(data.size()) + "]}";
  }
  return safetensors(header + "}", data);
}

}  // namespace mixtral::testing
