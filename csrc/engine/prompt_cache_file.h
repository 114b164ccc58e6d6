// A prefix in a file: tokens with their keys and values, so that another process goes on from them.
//
// A safetensors file: `model` U8 (fingerprint), `token_ids` I64 [N], and per layer l `keys.l`, `values.l`
// [pages,P,Nkv,D], the last pages of the prefix.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"

namespace mixtral {

struct PromptCache {
  std::vector<int64_t> ids;           // [N]
  RollingKVCache::Contents contents;  // of these N tokens
};

// Replaces the file, or leaves it as it was. Throws std::runtime_error when it cannot be written.
void write_prompt_cache(const PromptCache& saved, const MixtralImpl& model, const std::filesystem::path& path);

// Throws LoadError when the file is no prompt cache, or one of another model, type, device or page size.
PromptCache read_prompt_cache(const MixtralImpl& model, int64_t page_size, const std::filesystem::path& path);

}  // namespace mixtral
