// The parameters of the model: the one table of their names, shapes, and how each may be packed and cut. The modules
// allocate from it, and everything that reads, writes, counts or plans weights goes through it. What one of several
// processes holds of a parameter is told by placement.h.
//
// In the project's letters (csrc/ops/registration.cpp):
//   embed_tokens [vocab,H]                        norm [H]                      lm_head [vocab,H]
//   layers.N.input_layernorm [H]                  layers.N.post_attention_layernorm [H]
//   layers.N.attention.qkv_proj [(Nq+2Nkv)*D,H]   layers.N.attention.o_proj [H,Nq*D]
//   layers.N.moe.router [E,H]                     layers.N.moe.select_bias [E], if the configuration asks for it
//   layers.N.moe.gate_up_proj [E,2I,H]            layers.N.moe.down_proj [E,H,I]
// A dense model has layers.N.mlp.gate_up_proj [1,2I,H] and layers.N.mlp.down_proj [1,H,I] instead of `moe`. With
// tie_word_embeddings there is no lm_head: embed_tokens serves as both.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "config.h"
#include "weight_type.h"

namespace mixtral {

inline constexpr int64_t kPackedRows = 32;  // rows of a matrix in one packed block
inline constexpr int64_t kScaleGroup = 32;  // depths that share a scale in int4

// How the ranks of a stage share a parameter (shard_of in placement.h says what each of them gets).
enum class Cut {
  kNone,        // every rank holds the whole
  kHeads,       // rows: some heads of the queries, then their heads of the keys, then of the values
  kRows,        // rows
  kVocabulary,  // rows, where each rank gets whole packed blocks
  kGateUp,      // whole experts, or some rows of gate and the same rows of up
  kDown,        // whole experts, or the columns that go with those rows; rows in a dense block
};

struct Parameter {
  std::string name;            // its path in the model: "layers.0.attention.qkv_proj"
  std::vector<int64_t> shape;  // when it is not packed
  bool is_matrix = false;      // multiplied as a whole, so it may be packed; false for embeddings, norms and routers
  bool is_f32 = false;         // the router, unless config.router_in_f32 is false, and its bias
  bool is_expert = false;      // its first dimension is the experts, of which a token uses top_k
  Cut cut = Cut::kNone;
  int64_t layer = -1;  // that it is of; -1: none

  int64_t size() const;
  // How it is packed in a model of `packing`: not at all when its sizes do not allow it, as in an lm_head whose
  // vocabulary is no multiple of 32.
  Packing packing(Packing packing) const;
};

// In the order in which the model registers them.
std::vector<Parameter> model_parameters(const Config& config);

}  // namespace mixtral
