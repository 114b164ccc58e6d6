#include "weight_names.h"

#include "../model/transformer.h"

namespace mixtral {
namespace {

// How one spelling calls the tensors of a layer. A dense block and a single expert have the same three matrices.
struct Spelling {
  const char* model;  // before "layers.N."
  const char* embeddings;
  const char* norm;
  const char* lm_head;
  const char* input_norm;
  const char* post_attention_norm;
  const char* attention;
  const char* qkvo[4];
  const char* router;
  const char* experts;
  const char* dense;
  const char* expert_mlp[3];  // gate, up, down
  const char* dense_mlp[3];
};

constexpr Spelling kHuggingFaceSpelling = {"model.",
                                           "model.embed_tokens",
                                           "model.norm",
                                           "lm_head",
                                           "input_layernorm",
                                           "post_attention_layernorm",
                                           "self_attn.",
                                           {"q_proj", "k_proj", "v_proj", "o_proj"},
                                           "block_sparse_moe.gate",
                                           "block_sparse_moe.experts.",
                                           "mlp.",
                                           {"w1", "w3", "w2"},
                                           {"gate_proj", "up_proj", "down_proj"}};

constexpr Spelling kConsolidatedSpelling = {"",
                                            "tok_embeddings",
                                            "norm",
                                            "output",
                                            "attention_norm",
                                            "ffn_norm",
                                            "attention.",
                                            {"wq", "wk", "wv", "wo"},
                                            "feed_forward.gate",
                                            "feed_forward.experts.",
                                            "feed_forward.",
                                            {"w1", "w3", "w2"},
                                            {"w1", "w3", "w2"}};

class SliceList {
 public:
  SliceList(const Config& config, WeightNames names)
      : c_(config),
        names_(names),
        s_(names == WeightNames::kConsolidated ? kConsolidatedSpelling : kHuggingFaceSpelling) {}

  std::vector<WeightSlice> build() {
    add(s_.embeddings, {c_.vocab_size, c_.hidden_size}, "embed_tokens");
    add(s_.norm, {c_.hidden_size}, "norm");
    if (!c_.tie_word_embeddings) add(s_.lm_head, {c_.vocab_size, c_.hidden_size}, "lm_head");
    for (int64_t n = 0; n < c_.num_layers; ++n) {
      const std::string layer = "layers." + std::to_string(n) + ".";
      add(s_.model + layer + s_.input_norm, {c_.hidden_size}, layer + "input_layernorm");
      add(s_.model + layer + s_.post_attention_norm, {c_.hidden_size}, layer + "post_attention_layernorm");
      add_attention(s_.model + layer + s_.attention, layer + "attention.");
      if (!c_.is_moe()) {
        add_mlp(s_.model + layer + s_.dense, s_.dense_mlp, layer + "mlp.", 0);
      } else if (names_ == WeightNames::kHuggingFaceMerged) {
        add_merged_experts(s_.model + layer + "mlp.", layer + "moe.");
      } else {
        add_experts(s_.model + layer, layer + "moe.");
      }
    }
    return std::move(slices_);
  }

 private:
  void add(const std::string& tensor, std::vector<int64_t> shape, const std::string& parameter, int64_t first_row = 0,
           int64_t interleaved_head_dim = 0) {
    slices_.push_back({tensor + ".weight", std::move(shape), parameter, first_row, interleaved_head_dim});
  }

  void add_attention(const std::string& from, const std::string& to) {
    const int64_t q_rows = c_.num_heads * c_.head_dim, kv_rows = c_.num_kv_heads * c_.head_dim;
    const int64_t interleaved = names_ == WeightNames::kConsolidated ? c_.head_dim : 0;
    add(from + s_.qkvo[0], {q_rows, c_.hidden_size}, to + "qkv_proj", 0, interleaved);
    add(from + s_.qkvo[1], {kv_rows, c_.hidden_size}, to + "qkv_proj", q_rows, interleaved);
    add(from + s_.qkvo[2], {kv_rows, c_.hidden_size}, to + "qkv_proj", q_rows + kv_rows);
    add(from + s_.qkvo[3], {c_.hidden_size, q_rows}, to + "o_proj");
  }

  // Gate, up and down matrix of expert `m`; a dense block is expert 0.
  void add_mlp(const std::string& from, const char* const (&mlp)[3], const std::string& to, int64_t m) {
    const int64_t I = c_.intermediate_size, H = c_.hidden_size;
    add(from + mlp[0], {I, H}, to + "gate_up_proj", m * 2 * I);
    add(from + mlp[1], {I, H}, to + "gate_up_proj", m * 2 * I + I);
    add(from + mlp[2], {H, I}, to + "down_proj", m * H);
  }

  void add_experts(const std::string& from, const std::string& to) {
    add(from + s_.router, {c_.num_experts, c_.hidden_size}, to + "router");
    for (int64_t m = 0; m < c_.num_experts; ++m) {
      add_mlp(from + s_.experts + std::to_string(m) + ".", s_.expert_mlp, to, m);
    }
  }

  void add_merged_experts(const std::string& from, const std::string& to) {
    const int64_t E = c_.num_experts, I = c_.intermediate_size, H = c_.hidden_size;
    add(from + "gate", {E, H}, to + "router");
    slices_.push_back({from + "experts.gate_up_proj", {E, 2 * I, H}, to + "gate_up_proj"});
    slices_.push_back({from + "experts.down_proj", {E, H, I}, to + "down_proj"});
  }

  const Config& c_;
  const WeightNames names_;
  const Spelling& s_;
  std::vector<WeightSlice> slices_;
};

}  // namespace

int64_t WeightSlice::rows() const {
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) rows *= shape[d];
  return rows;
}

namespace {

// Every parameter of the quantised model is one tensor of its own name.
std::vector<WeightSlice> parameter_slices(const Config& config) {
  const WeightType type = parse_weight_type("auto", config, torch::kCPU);
  const MixtralImpl model(config, type.dtype, torch::kMeta, type.packing);
  std::vector<WeightSlice> slices;
  for (const auto& item : model.named_parameters()) {
    const torch::Tensor& parameter = item.value();
    slices.push_back({item.key(), parameter.sizes().vec(), item.key()});
    if (is_packed(parameter)) slices.back().packed = parameter.scalar_type();
  }
  return slices;
}

}  // namespace

std::vector<WeightSlice> weight_slices(const Config& config, WeightNames names) {
  return names == WeightNames::kParameters ? parameter_slices(config) : SliceList(config, names).build();
}

}  // namespace mixtral
