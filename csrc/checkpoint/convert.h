// From any checkpoint that can be read to a plain Hugging Face folder, one parameter at a time.
#pragma once

#include <filesystem>

#include "load_options.h"

namespace mixtral {

inline constexpr uint64_t kMaxShardBytes = 5'000'000'000;

// Writes config.json, model*.safetensors in the names of transformers v4, and the small files of `source` into an
// unused `folder`, which appears complete or not at all. A file holds at most `max_shard_bytes` of tensors, or one
// tensor. `options`: dtype "auto" (the checkpoint's), "float32", "bfloat16" or "float16"; lora, check_weights, warn and
// progress (bytes written). Needs memory for the largest parameter alone. Throws LoadError; std::invalid_argument when
// the checkpoint is quantised by `mixtral quantize`, the dtype is another one or `folder` is in use; std::runtime_error
// when it cannot be written.
void convert(const std::filesystem::path& source, const std::filesystem::path& folder, const LoadOptions& options,
             uint64_t max_shard_bytes = kMaxShardBytes);

}  // namespace mixtral
