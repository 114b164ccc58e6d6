#include "rank_plan.h"

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "../checkpoint/memory_plan.h"
#include "../io/load_error.h"
#include "../model/parameters.h"
#include "../model/placement.h"
#include "load.h"
#include "report.h"

namespace mixtral::app {
namespace {

const char* kind_of(const Parameter& parameter) {
  if (parameter.name == "embed_tokens") return "embeddings_bytes";
  if (parameter.name == "lm_head") return "lm_head_bytes";
  if (parameter.cut == Cut::kHeads || parameter.cut == Cut::kRows) return "attention_bytes";
  if (parameter.cut == Cut::kGateUp || parameter.cut == Cut::kDown) return "mlp_bytes";
  return "other_bytes";  // norms and routers
}

nlohmann::json plan_of(const Placement& placement, const ModelFlags& flags, const Config& config) {
  placement.check(config);
  const WeightType type = parse_weight_type(flags.dtype, config, flags.device, /*pack=*/true, placement);
  const MemoryPlan memory = plan_memory(config, type, flags.device, flags.ctx_size, flags.chunk_size, placement);
  nlohmann::json rank = {{"rank", placement.rank()},
                         {"tensor_rank", placement.tensor_rank},
                         {"stage", placement.stage},
                         {"first_layer", placement.first_layer(config)},
                         {"end_layer", placement.end_layer(config)},
                         {"num_heads", placement.num_heads(config)},
                         {"num_kv_heads", placement.num_kv_heads(config)},
                         {"num_experts", placement.num_experts(config)},
                         {"weights_bytes", static_cast<int64_t>(memory.weights)}};
  for (const char* kind : {"embeddings_bytes", "attention_bytes", "mlp_bytes", "lm_head_bytes", "other_bytes"}) {
    double bytes = 0;
    for (Parameter& parameter : placed_parameters(config, placement)) {
      parameter.shape = shard_of(parameter, config, placement).shape;
      if (kind_of(parameter) == std::string(kind)) bytes += parameter_bytes(parameter, type);
    }
    rank[kind] = static_cast<int64_t>(bytes);
  }
  rank["kv_bytes_per_token"] = placement.kv_bytes_per_token(config, type.element_size());
  rank["kv_bytes"] = static_cast<int64_t>(memory.cache);
  rank["activations_bytes"] = static_cast<int64_t>(memory.activations);
  rank["total_bytes"] = static_cast<int64_t>(memory.weights + memory.cache);
  return rank;
}

}  // namespace

nlohmann::json rank_plan(const ModelFlags& model, const ParallelFlags& parallel, const Config& config) {
  nlohmann::json ranks = nlohmann::json::array();
  try {
    for (int rank = 0; rank < parallel.tensor_size * parallel.stages; ++rank)
      ranks.push_back(plan_of(Placement::of_rank(rank, parallel.tensor_size, parallel.stages, parallel.expert_parallel),
                              model, config));
  } catch (const std::invalid_argument& error) {
    throw LoadError(model_path(model).string(), "", error.what());
  }
  return {{"tensor_parallel_size", parallel.tensor_size},
          {"pipeline_parallel_size", parallel.stages},
          {"expert_parallel", parallel.expert_parallel},
          {"ranks", ranks}};
}

std::string plan_text(const nlohmann::json& plan) {
  std::string text;
  for (const nlohmann::json& rank : plan["ranks"]) {
    const auto bytes = [&rank](const std::string& name) {
      return bytes_text(static_cast<double>(rank[name + "_bytes"].get<int64_t>()));
    };
    const auto number = [&rank](const char* name) { return std::to_string(rank[name].get<int64_t>()); };
    char name[32];
    std::snprintf(name, sizeof name, "%-14s ", ("rank " + number("rank")).c_str());
    const int64_t last_layer = rank["end_layer"].get<int64_t>() - 1;
    const std::string indent(15, ' ');
    text += name + std::string("layers ") + number("first_layer") + " to " + std::to_string(last_layer) + ", " +
            number("num_heads") + " query and " + number("num_kv_heads") + " key/value heads" +
            (rank["num_experts"] == 0 ? "" : ", " + number("num_experts") + " experts") + "\n";
    text += indent + "weights " + bytes("weights") + ": embeddings " + bytes("embeddings") + ", attention " +
            bytes("attention") + ", feed-forward " + bytes("mlp") + ", lm_head " + bytes("lm_head") + ", others " +
            bytes("other") + "\n";
    text += indent + "cache " + bytes_text(static_cast<double>(rank["kv_bytes_per_token"].get<int64_t>())) +
            " per token, " + bytes("kv") + "; total " + bytes("total") + ", and " + bytes("activations") +
            " of activations\n";
  }
  return text;
}

}  // namespace mixtral::app
