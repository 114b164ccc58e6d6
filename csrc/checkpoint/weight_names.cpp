#include "weight_names.h"

#include "../model/packing.h"

namespace mixtral {
namespace {

// How one spelling calls the tensors of a layer. A dense block and a single expert have the same three matrices.
struct Spelling {
  const char* layers;  // before "N."
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

constexpr Spelling kHuggingFaceSpelling = {"model.layers.",
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

constexpr Spelling kConsolidatedSpelling = {"layers.",
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

constexpr Spelling kGgufSpelling = {"blk.",
                                    "token_embd",
                                    "output_norm",
                                    "output",
                                    "attn_norm",
                                    "ffn_norm",
                                    "",
                                    {"attn_q", "attn_k", "attn_v", "attn_output"},
                                    "ffn_gate_inp",
                                    "",
                                    "",
                                    {"ffn_gate", "ffn_up", "ffn_down"},
                                    {"ffn_gate", "ffn_up", "ffn_down"}};

bool is_gguf(WeightNames names) { return names == WeightNames::kGguf || names == WeightNames::kGgufMerged; }

bool is_consolidated(WeightNames names) {
  return names == WeightNames::kConsolidated || names == WeightNames::kStacked;
}

// The tensors of a checkpoint, parameter by parameter.
class SliceVisitor {
 public:
  SliceVisitor(const Config& config, WeightNames names, const std::function<void(WeightSlice)>& visit)
      : config_(config),
        names_(names),
        spelling_(is_gguf(names)           ? kGgufSpelling
                  : is_consolidated(names) ? kConsolidatedSpelling
                                           : kHuggingFaceSpelling),
        visit_(visit) {}

  void run() {
    for (const Parameter& parameter : model_parameters(config_)) add(parameter);
  }

 private:
  // One tensor of a checkpoint and its number of rows.
  struct Rows {
    std::string tensor;
    int64_t count;
    int64_t interleaved_head_dim = 0;
  };

  void add(const Parameter& parameter) {
    const size_t number = std::string("layers.").size();
    const size_t layer = parameter.name.rfind("layers.", 0) == 0 ? parameter.name.find('.', number) + 1 : 0;
    const std::string path = layer > 0 ? spelling_.layers + parameter.name.substr(number, layer - number) : "";
    const std::string name = parameter.name.substr(layer);  // "moe.router"
    if (name == "embed_tokens") return add_whole(parameter, spelling_.embeddings);
    if (name == "norm") return add_whole(parameter, spelling_.norm);
    if (name == "lm_head") return add_whole(parameter, spelling_.lm_head);
    if (name == "input_layernorm") return add_whole(parameter, path + spelling_.input_norm);
    if (name == "post_attention_layernorm") return add_whole(parameter, path + spelling_.post_attention_norm);
    if (name == "attention.qkv_proj") return add_qkv(parameter, path + spelling_.attention);
    if (name == "attention.o_proj") return add_whole(parameter, path + spelling_.attention + spelling_.qkvo[3]);
    if (names_ == WeightNames::kHuggingFaceMerged && config_.is_moe()) return add_merged(parameter, path + "mlp.");
    const bool stacked = names_ == WeightNames::kStacked && config_.is_moe();
    if (name == "moe.router")
      return add_whole(parameter, path + (stacked ? "block_sparse_moe.gate" : spelling_.router));
    if (name == "moe.select_bias") return add_bias(parameter, path, stacked);
    const std::string matrices = name.substr(name.find('.') + 1);  // "gate_up_proj"
    if (stacked) return add_stacked(parameter, path + "block_sparse_moe.", matrices);
    if (names_ == WeightNames::kGgufMerged && config_.is_moe()) return add_gguf_merged(parameter, path, matrices);
    add_experts(parameter, path, matrices);
  }

  void add_whole(const Parameter& parameter, const std::string& tensor) {
    visit_({tensor + ".weight", parameter.shape, parameter.name});
  }

  void add_bias(const Parameter& parameter, const std::string& path, bool stacked) {
    const std::string gate = stacked ? "block_sparse_moe.gate" : spelling_.router;
    visit_({path + gate + ".e_score_correction_bias", parameter.shape, parameter.name});
  }

  // The rows of the parameter, cut into tensors from the first row on.
  void add_rows(const Parameter& parameter, const std::vector<Rows>& cuts) {
    int64_t first_row = 0;
    for (const Rows& rows : cuts) {
      visit_({rows.tensor + ".weight",
              {rows.count, parameter.shape.back()},
              parameter.name,
              first_row,
              rows.interleaved_head_dim});
      first_row += rows.count;
    }
  }

  void add_qkv(const Parameter& parameter, const std::string& from) {
    const int64_t q_rows = config_.num_heads * config_.head_dim, kv_rows = config_.num_kv_heads * config_.head_dim;
    const int64_t interleaved = is_consolidated(names_) || is_gguf(names_) ? config_.head_dim : 0;
    add_rows(parameter, {{from + spelling_.qkvo[0], q_rows, interleaved},
                         {from + spelling_.qkvo[1], kv_rows, interleaved},
                         {from + spelling_.qkvo[2], kv_rows}});
  }

  // gate_up_proj or down_proj: one matrix after the other of every expert; a dense block is one expert.
  void add_experts(const Parameter& parameter, const std::string& path, const std::string& name) {
    const auto& mlp = config_.is_moe() ? spelling_.expert_mlp : spelling_.dense_mlp;
    std::vector<Rows> cuts;
    for (int64_t m = 0; m < parameter.shape[0]; ++m) {
      const auto tensor = [&](const char* matrix) {
        if (!config_.is_moe()) return path + spelling_.dense + matrix;
        const std::string expert = std::to_string(m);
        return path + spelling_.experts + (is_gguf(names_) ? matrix + ("." + expert) : expert + "." + matrix);
      };
      if (name == "gate_up_proj") {
        cuts.push_back({tensor(mlp[0]), config_.intermediate_size});
        cuts.push_back({tensor(mlp[1]), config_.intermediate_size});
      } else {
        cuts.push_back({tensor(mlp[2]), parameter.shape[1]});
      }
    }
    add_rows(parameter, cuts);
  }

  // The matrix of expert `m` in a tensor that holds one of every expert, to the rows of the parameter from `first_row`.
  void add_matrix_of(int64_t m, const Parameter& parameter, const std::string& tensor, std::vector<int64_t> shape,
                     int64_t matrix_rows, int64_t first_row, bool transposed = false) {
    WeightSlice slice = {tensor, std::move(shape), parameter.name, first_row};
    slice.first_tensor_row = m * matrix_rows;
    slice.tensor_rows = matrix_rows;
    slice.transposed = transposed;
    visit_(std::move(slice));
  }

  // [E,I,H], [E,I,H] and [E,H,I]
  void add_gguf_merged(const Parameter& parameter, const std::string& path, const std::string& name) {
    const int64_t experts = config_.num_experts, rows = config_.intermediate_size, hidden = config_.hidden_size;
    for (int64_t m = 0; m < experts; ++m) {
      if (name == "gate_up_proj") {
        add_matrix_of(m, parameter, path + "ffn_gate_exps.weight", {experts, rows, hidden}, rows, 2 * m * rows);
        add_matrix_of(m, parameter, path + "ffn_up_exps.weight", {experts, rows, hidden}, rows, (2 * m + 1) * rows);
      } else {
        add_matrix_of(m, parameter, path + "ffn_down_exps.weight", {experts, hidden, rows}, hidden, m * hidden);
      }
    }
  }

  // [E*I,H] each
  void add_stacked(const Parameter& parameter, const std::string& path, const std::string& name) {
    const int64_t experts = config_.num_experts, rows = config_.intermediate_size, hidden = config_.hidden_size;
    for (int64_t m = 0; m < experts; ++m) {
      if (name == "gate_up_proj") {
        add_matrix_of(m, parameter, path + "w1", {experts * rows, hidden}, rows, 2 * m * rows);
        add_matrix_of(m, parameter, path + "w3", {experts * rows, hidden}, rows, (2 * m + 1) * rows);
      } else {
        add_matrix_of(m, parameter, path + "w2", {experts * rows, hidden}, rows, m * hidden, /*transposed=*/true);
      }
    }
  }

  void add_merged(const Parameter& parameter, const std::string& from) {
    const std::string name = parameter.name.substr(parameter.name.rfind('.') + 1);
    if (name == "router") return add_whole(parameter, from + "gate");
    if (name == "select_bias") {
      return visit_({from + "gate.e_score_correction_bias", parameter.shape, parameter.name});
    }
    visit_({from + "experts." + name, parameter.shape, parameter.name});
  }

  const Config& config_;
  const WeightNames names_;
  const Spelling& spelling_;
  const std::function<void(WeightSlice)>& visit_;
};

// Every parameter of a quantised model is one tensor of its own name, in its packed shape.
void visit_parameters(const Config& config, const std::function<void(WeightSlice)>& visit) {
  const WeightType type = parse_weight_type("auto", config);
  for (const Parameter& parameter : model_parameters(config)) {
    const auto meta = empty_parameter(parameter, scalar_type(type.dtype), torch::kMeta, type.packing);
    WeightSlice slice = {parameter.name, meta.sizes().vec(), parameter.name};
    if (is_packed(meta)) slice.packed = meta.scalar_type();
    visit(std::move(slice));
  }
}

}  // namespace

int64_t WeightSlice::rows() const {
  if (tensor_rows > 0) return tensor_rows;
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) rows *= shape[d];
  return rows;
}

void visit_weight_slices(const Config& config, WeightNames names, const std::function<void(WeightSlice)>& visit) {
  names == WeightNames::kParameters ? visit_parameters(config, visit) : SliceVisitor(config, names, visit).run();
}

std::vector<WeightSlice> weight_slices(const Config& config, WeightNames names) {
  std::vector<WeightSlice> slices;
  visit_weight_slices(config, names, [&](WeightSlice slice) { slices.push_back(std::move(slice)); });
  return slices;
}

}  // namespace mixtral
