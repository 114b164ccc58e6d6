#include "placement.h"

#include <algorithm>
#include <stdexcept>

#include "parameters.h"

namespace mixtral {
namespace {

void check(bool condition, const std::string& rule, int got) {
  if (!condition) throw std::invalid_argument(rule + ", got " + std::to_string(got));
}

void check_divides(int tensor_size, const char* what, int64_t size) {
  check(size % tensor_size == 0, "tensor_parallel_size must divide " + std::string(what) + " " + std::to_string(size),
        tensor_size);
}

// Part `index` of `size` in `parts` equal ones.
RowRange part_of(int64_t size, int parts, int index) { return {size / parts * index, size / parts * (index + 1)}; }

RowRange moved(RowRange range, int64_t by) { return {range.begin + by, range.end + by}; }

// Rows of the heads of the queries, of the keys and of the values.
std::vector<RowRange> head_rows(const Config& config, const Placement& placement) {
  const int64_t D = config.head_dim, kv = placement.num_kv_heads(config);
  const RowRange q = part_of(config.num_heads * D, placement.tensor_size, placement.tensor_rank);
  const int64_t first = config.num_kv_heads * placement.tensor_rank / placement.tensor_size;
  const RowRange k = moved({first * D, (first + kv) * D}, config.num_heads * D);
  return {q, k, moved(k, config.num_kv_heads * D)};
}

// The rows `part` of gate and of up of each of `experts`.
std::vector<RowRange> gate_up_rows(int64_t experts, int64_t intermediate_size, RowRange part) {
  std::vector<RowRange> rows;
  for (int64_t half = 0; half < 2 * experts; ++half) rows.push_back(moved(part, half * intermediate_size));
  return rows;
}

}  // namespace

Placement Placement::of_rank(int rank, int tensor_size, int stages, bool expert_parallel) {
  const auto is_size = [](int size) { return 1 <= size && size <= 4096; };
  mixtral::check(is_size(tensor_size), "tensor_parallel_size must be in [1, 4096]", tensor_size);
  mixtral::check(is_size(stages), "pipeline_parallel_size must be in [1, 4096]", stages);
  mixtral::check(0 <= rank && rank < tensor_size * stages,
                 "rank must be in [0, " + std::to_string(tensor_size * stages) + ")", rank);
  return {tensor_size, rank % tensor_size, stages, stages - 1 - rank / tensor_size, expert_parallel};
}

std::vector<int> Placement::stage_ranks(int of_stage) const {
  std::vector<int> ranks;
  for (int r = 0; r < tensor_size; ++r) ranks.push_back((stages - 1 - of_stage) * tensor_size + r);
  return ranks;
}

void Placement::check(const Config& config) const {
  mixtral::check(stages <= config.num_layers,
                 "pipeline_parallel_size must be at most num_layers " + std::to_string(config.num_layers), stages);
  check_divides(tensor_size, "num_heads", config.num_heads);
  mixtral::check(config.num_kv_heads % tensor_size == 0 || tensor_size % config.num_kv_heads == 0,
                 "tensor_parallel_size must divide num_kv_heads " + std::to_string(config.num_kv_heads) +
                     " or be a multiple of it",
                 tensor_size);
  check_divides(tensor_size, "hidden_size", config.hidden_size);
  if (config.is_moe() && expert_parallel) {
    check_divides(tensor_size, "num_experts", config.num_experts);
  } else {
    check_divides(tensor_size, "intermediate_size", config.intermediate_size);
  }
}

// Rounded up: where stages cannot be equal, the first ones have a layer more, and the last one has the head.
int64_t Placement::first_layer(const Config& config) const { return (config.num_layers * stage + stages - 1) / stages; }

int64_t Placement::end_layer(const Config& config) const {
  return (config.num_layers * (stage + 1) + stages - 1) / stages;
}

int64_t Placement::num_heads(const Config& config) const { return config.num_heads / tensor_size; }

int64_t Placement::num_kv_heads(const Config& config) const {
  return std::max<int64_t>(config.num_kv_heads / tensor_size, 1);
}

int64_t Placement::first_expert(const Config& config) const {
  return expert_parallel ? num_experts(config) * tensor_rank : 0;
}

int64_t Placement::num_experts(const Config& config) const {
  return expert_parallel ? config.num_experts / tensor_size : config.num_experts;
}

int64_t Placement::intermediate_size(const Config& config) const {
  return config.is_moe() && expert_parallel ? config.intermediate_size : config.intermediate_size / tensor_size;
}

int64_t Placement::kv_bytes_per_token(const Config& config, int64_t element_size) const {
  return (end_layer(config) - first_layer(config)) * 2 * num_kv_heads(config) * config.head_dim * element_size;
}

std::string Placement::name() const {
  const auto of = [](int index, int size) { return std::to_string(index) + " of " + std::to_string(size); };
  return "tensor " + of(tensor_rank, tensor_size) + ", stage " + of(stage, stages);
}

ParameterShard shard_of(const Parameter& parameter, const Config& config, const Placement& placement) {
  const int64_t rows = parameter.size() / parameter.shape.back();
  ParameterShard shard = {{{0, rows}}, 0, parameter.shape.back(), parameter.shape};
  const auto cut = [&](int64_t size) { return part_of(size, placement.tensor_size, placement.tensor_rank); };
  const bool whole_experts = config.is_moe() && placement.expert_parallel;
  switch (parameter.cut) {
    case Cut::kNone:
      return shard;
    case Cut::kHeads:
      shard.rows = head_rows(config, placement);
      break;
    case Cut::kVocabulary:
      if (rows % (kPackedRows * placement.tensor_size) != 0) return shard;
      shard.rows = {cut(rows)};
      break;
    case Cut::kRows:
      shard.rows = {cut(rows)};
      break;
    case Cut::kGateUp:
      if (whole_experts) {
        shard.rows = {cut(rows)};
      } else {
        shard.rows = gate_up_rows(parameter.shape[0], config.intermediate_size, cut(config.intermediate_size));
      }
      break;
    case Cut::kDown:
      if (whole_experts || placement.expert_parallel) {
        shard.rows = {cut(rows)};
      } else {
        const RowRange columns = cut(config.intermediate_size);
        shard.first_column = columns.begin;
        shard.columns = columns.end - columns.begin;
      }
      break;
  }
  int64_t held = 0;
  for (const RowRange& range : shard.rows) held += range.end - range.begin;
  shard.shape.back() = shard.columns;
  if (shard.shape.size() == 3 && whole_experts) shard.shape[0] = placement.num_experts(config);
  const size_t row_dim = shard.shape.size() - 2;
  shard.shape[row_dim] = row_dim == 0 ? held : held / shard.shape[0];
  return shard;
}

std::vector<Parameter> placed_parameters(const Config& config, const Placement& placement) {
  std::vector<Parameter> list = model_parameters(config);
  const int64_t first = placement.first_layer(config), end = placement.end_layer(config);
  const auto is_elsewhere = [&](const Parameter& parameter) {
    if (parameter.layer >= 0) return parameter.layer < first || parameter.layer >= end;
    if (parameter.name != "embed_tokens") return !placement.is_last_stage();
    return !placement.is_first_stage() && !(config.tie_word_embeddings && placement.is_last_stage());
  };
  list.erase(std::remove_if(list.begin(), list.end(), is_elsewhere), list.end());
  return list;
}

}  // namespace mixtral
