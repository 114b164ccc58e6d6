#include "config.h"

#include <cmath>

#include "../io/load_error.h"
#include "config_fields.h"
#include "parameters.h"

namespace mixtral {
namespace {

void check(bool condition, const std::string& source, const char* field, const std::string& reason) {
  if (!condition) throw LoadError(source, field, reason);
}

void check_range(const Config& config, const IntegerField& field, const std::string& source) {
  const int64_t value = config.*field.member;
  check(field.min <= value && value <= field.max, source, field.key(config.layout),
        "must be in [" + std::to_string(field.min) + ", " + std::to_string(field.max) + "], got " +
            std::to_string(value));
}

void check_positive(double value, const std::string& source, const char* field) {
  check(std::isfinite(value) && value > 0, source, field, "must be positive and finite, got " + std::to_string(value));
}

// The parameters that a token passes through when `experts` of every layer compute for it.
int64_t count_parameters(const Config& config, int64_t experts) {
  int64_t count = 0;
  for (const Parameter& parameter : model_parameters(config))
    count += parameter.is_expert ? parameter.size() / config.num_experts * experts : parameter.size();
  return count;
}

}  // namespace

void Config::validate(const std::string& source) const {
  for (const IntegerField& field :
       {kHiddenSize, kIntermediateSize, kNumLayers, kNumHeads, kNumKvHeads, kHeadDim, kVocabSize, kMaxPosition}) {
    check_range(*this, field, source);
  }
  check(num_heads % num_kv_heads == 0, source, kNumHeads.key(layout),
        "must be a multiple of " + std::to_string(num_kv_heads) + " key/value heads, got " + std::to_string(num_heads));
  check(head_dim % 2 == 0, source, "head_dim", "must be even, got " + std::to_string(head_dim));
  if (window != 0) check_range(*this, kWindow, source);
  if (num_experts != 0 || top_k != 0) {
    check_range(*this, kNumExperts, source);
    check_range(*this, kTopK, source);
    check(top_k <= num_experts, source, kTopK.key(layout),
          "must be at most " + std::to_string(num_experts) + " experts, got " + std::to_string(top_k));
  }
  check(!select_bias || is_moe(), source, "use_expert_bias", "must be false in a model without experts");
  const bool hugging_face = layout == CheckpointLayout::kHuggingFace;
  check_positive(rms_norm_eps, source, hugging_face ? "rms_norm_eps" : "norm_eps");
  check_positive(rope_theta, source, "rope_theta");
  check(dtype == "float32" || dtype == "bfloat16" || dtype == "float16", source, "dtype",
        "must be float32, bfloat16 or float16");
  if (!quantization.empty()) {
    const std::string unfit = unfit_size(*this);
    check(unfit.empty(), source, "quantization_config", "needs sizes that are multiples of 32, got " + unfit);
  }
  const auto is_token = [&](int64_t id) { return 0 <= id && id < vocab_size; };
  const std::string token_range = "must be a token id in [0, " + std::to_string(vocab_size) + "), got ";
  check(is_token(bos_token_id), source, "bos_token_id", token_range + std::to_string(bos_token_id));
  for (const int64_t id : eos_token_ids) check(is_token(id), source, "eos_token_id", token_range + std::to_string(id));
}

void Config::check_experts_per_token(int64_t k) const {
  if (is_moe() && 1 <= k && k <= num_experts) return;
  throw std::invalid_argument("experts_per_token must be " +
                              (is_moe() ? "in [1, " + std::to_string(num_experts) + "]"
                                        : std::string("left out, as the model has no experts")) +
                              ", got " + std::to_string(k));
}

int64_t Config::total_parameters() const { return count_parameters(*this, num_experts); }

int64_t Config::active_parameters() const { return count_parameters(*this, top_k); }

int64_t Config::kv_bytes_per_token(int64_t element_size) const {
  return num_layers * 2 * num_kv_heads * head_dim * element_size;
}

}  // namespace mixtral
