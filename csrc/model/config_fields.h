// The integers of Config: where each stands in the three kinds of file, and its bounds.
#pragma once

#include "config.h"

namespace mixtral {

struct IntegerField {
  int64_t Config::*member;
  const char* hugging_face;  // key in config.json
  const char* consolidated;  // key in params.json
  const char* gguf;          // key in the metadata of a GGUF file, behind "llama."
  int64_t min, max;          // wide enough for any real model; products of sizes stay far below 2^63

  const char* key(CheckpointLayout layout) const {
    return layout == CheckpointLayout::kHuggingFace ? hugging_face
           : layout == CheckpointLayout::kGguf      ? gguf
                                                    : consolidated;
  }
};

inline constexpr int64_t kMaxInt32 = 2147483647;

inline constexpr IntegerField kHiddenSize{&Config::hidden_size, "hidden_size", "dim", "embedding_length", 1, 1 << 17};
inline constexpr IntegerField kIntermediateSize{
    &Config::intermediate_size, "intermediate_size", "hidden_dim", "feed_forward_length", 1, 1 << 20};
inline constexpr IntegerField kNumLayers{
    &Config::num_layers, "num_hidden_layers", "n_layers", "block_count", 1, 1 << 10};
inline constexpr IntegerField kNumHeads{
    &Config::num_heads, "num_attention_heads", "n_heads", "attention.head_count", 1, 1 << 12};
inline constexpr IntegerField kNumKvHeads{
    &Config::num_kv_heads, "num_key_value_heads", "n_kv_heads", "attention.head_count_kv", 1, 1 << 12};
inline constexpr IntegerField kHeadDim{&Config::head_dim, "head_dim", "head_dim", "attention.key_length", 2, 1 << 10};
inline constexpr IntegerField kVocabSize{&Config::vocab_size, "vocab_size", "vocab_size", "vocab_size", 1, 1 << 24};
inline constexpr IntegerField kMaxPosition{
    &Config::max_position, "max_position_embeddings", "max_seq_len", "context_length", 1, kMaxInt32};
inline constexpr IntegerField kNumExperts{
    &Config::num_experts, "num_local_experts", "num_experts", "expert_count", 1, 1 << 11};
inline constexpr IntegerField kTopK{
    &Config::top_k, "num_experts_per_tok", "num_experts_per_tok", "expert_used_count", 1, 1 << 11};
inline constexpr IntegerField kWindow{
    &Config::window, "sliding_window", "sliding_window", "attention.sliding_window", 1, kMaxInt32};

}  // namespace mixtral
