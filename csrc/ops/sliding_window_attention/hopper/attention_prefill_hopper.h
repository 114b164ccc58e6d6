// Attention of many queries on Hopper (attention_prefill_hopper.cuh).
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <limits>

#include "../sliding_window_attention.h"
#include "attention_prefill_blocks_hopper.h"

namespace mixtral {

using torch::headeronly::BFloat16;

// Whether the kernel can compute the problem; decided by sizes, the scale and the alignment of pointers alone.
inline bool takes_attention_prefill_hopper(const AttentionProblem<BFloat16>& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // TMA's coordinates are int32
  const KeyLayout& keys = p.keys;
  const auto aligned = [](const BFloat16* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  // Boxes lie in atoms of 8 rows of the swizzle and fill a block.
  const bool whole_boxes =
      !keys.page_table || (keys.page_size >= 8 && kBlockKeys % keys.page_size == 0) || keys.page_size % kBlockKeys == 0;
  return p.tokens > 0 && p.num_heads > 0 && p.head_dim == 128 && p.num_heads / p.num_kv_heads <= kTileRows &&
         p.num_kv_heads <= 65535 && p.scale > 0.0f && p.tokens + p.sequences <= kMost / 2 / p.num_kv_heads &&
         keys.pages > 0 && keys.page_size > 0 && whole_boxes && keys.page_size <= kMost / keys.pages &&
         (!keys.page_table || keys.columns <= kMost / keys.page_size) && aligned(p.q) && aligned(p.k) && aligned(p.v) &&
         aligned(p.out);
}

// Requires takes_attention_prefill_hopper. Returns a cudaError_t.
int launch_attention_prefill_hopper(const AttentionProblem<BFloat16>& problem, cudaStream_t stream);

}  // namespace mixtral
