#include "parameters.h"

#include <functional>
#include <numeric>
#include <utility>

namespace mixtral {
namespace {

Parameter vector(std::string name, int64_t size) { return {std::move(name), {size}}; }

Parameter matrix(std::string name, std::vector<int64_t> shape, Cut cut) {
  return {std::move(name), std::move(shape), /*is_matrix=*/true, /*is_f32=*/false, /*is_expert=*/false, cut};
}

// The two matrices of `experts` experts, or of a dense block, which is one.
void add_mlp(std::vector<Parameter>& list, const std::string& path, const Config& config, int64_t experts) {
  const int64_t H = config.hidden_size, I = config.intermediate_size;
  list.push_back(matrix(path + "gate_up_proj", {experts, 2 * I, H}, Cut::kGateUp));
  list.push_back(matrix(path + "down_proj", {experts, H, I}, Cut::kDown));
}

void add_layer(std::vector<Parameter>& list, const std::string& path, const Config& config) {
  const int64_t H = config.hidden_size, q = config.num_heads * config.head_dim;
  const int64_t kv = config.num_kv_heads * config.head_dim;
  list.push_back(vector(path + "input_layernorm", H));
  list.push_back(vector(path + "post_attention_layernorm", H));
  list.push_back(matrix(path + "attention.qkv_proj", {q + 2 * kv, H}, Cut::kHeads));
  list.push_back(matrix(path + "attention.o_proj", {H, q}, Cut::kRows));
  if (!config.is_moe()) return add_mlp(list, path + "mlp.", config, 1);
  list.push_back({path + "moe.router", {config.num_experts, H}, /*is_matrix=*/false, config.router_in_f32});
  if (config.select_bias) {
    list.push_back({path + "moe.select_bias", {config.num_experts}, /*is_matrix=*/false, /*is_f32=*/true});
  }
  add_mlp(list, path + "moe.", config, config.num_experts);
  for (auto expert = list.end() - 2; expert != list.end(); ++expert) expert->is_expert = true;
}

}  // namespace

int64_t Parameter::size() const { return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()); }

Packing Parameter::packing(Packing packing) const {
  const bool fits = is_matrix && *(shape.end() - 2) % kPackedRows == 0 && shape.back() % kPackedRows == 0;
  return fits ? packing : Packing::kNone;
}

std::vector<Parameter> model_parameters(const Config& config) {
  const std::vector<int64_t> vocab_by_hidden = {config.vocab_size, config.hidden_size};
  std::vector<Parameter> list;
  list.push_back({"embed_tokens", vocab_by_hidden});
  list.push_back(vector("norm", config.hidden_size));
  if (!config.tie_word_embeddings) list.push_back(matrix("lm_head", vocab_by_hidden, Cut::kVocabulary));
  for (int64_t n = 0; n < config.num_layers; ++n) {
    const size_t begin = list.size();
    add_layer(list, "layers." + std::to_string(n) + ".", config);
    for (size_t i = begin; i < list.size(); ++i) list[i].layer = n;
  }
  return list;
}

}  // namespace mixtral
