#include "calibrate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>

#include "../model/memory.h"
#include "../model/observer.h"
#include "../model/ops.h"
#include "../model/parallel.h"
#include "../model/parameters.h"
#include "../model/transformer.h"
#include "weights.h"

namespace mixtral {
namespace {

constexpr int64_t kSequenceTokens = 2048;  // as in the paper
constexpr int64_t kGramTokens = 4096;      // converted to f32 at a time
constexpr double kDamping = 0.01;          // of the mean of the diagonal, added to it

// gram [K,K] -> U f32 [K,K], upper triangular: the inverse of the damped matrix is U^T U. With L L^T for the matrix
// reversed, L reversed is R in G = R R^T, and U its inverse: no inverse of G itself is needed.
torch::Tensor inverse_factor(const torch::Tensor& gram) {
  auto factor = gram.to(torch::kFloat64);
  factor.diagonal().add_(kDamping * factor.diagonal().mean());
  factor = torch::linalg_cholesky(factor.flip({0, 1}));
  factor = factor.flip({0, 1});
  const auto identity = torch::eye(gram.size(0), factor.options());
  return torch::linalg_solve_triangular(factor, identity, /*upper=*/true).to(torch::kFloat32).contiguous();
}

// One row's group of columns, rounded at one scale.
struct RoundedGroup {
  float values[kScaleGroup];  // the weights; after round(), their rounded values
  float errors[kScaleGroup];  // each divided by its column's diagonal element of U
  double loss = 0;            // sum of their squares: the roundings' share of the squared error of the results

  // An error in column i changes later column j by U[i,j] / U[i,i] of it. factor: U from the group's first element on.
  void round(float scale, const float* factor, int64_t depth) {
    for (int64_t i = 0; i < kScaleGroup; ++i) {
      const float* const u = factor + i * depth;
      const float level = std::clamp(std::floor(values[i] / scale) + 0.5f, -7.5f, 7.5f);
      const float value = c10::BFloat16(level * scale), error = (values[i] - value) / u[i];
      for (int64_t j = i + 1; j < kScaleGroup; ++j) values[j] -= error * u[j];
      values[i] = value;
      errors[i] = error;
      loss += static_cast<double>(error) * static_cast<double>(error);
    }
  }
};

// Rounds the columns [k, k + 32) of rows [N,K] in place. scales uint8 [N]: those of the nearest roundings; of each and
// its neighbours the one of least loss replaces it. factor: U [K,K] -> errors [N,32]
torch::Tensor round_group(const torch::Tensor& rows, int64_t k, const torch::Tensor& scales,
                          const torch::Tensor& factor) {
  const int64_t depth = rows.size(1);
  const auto errors = torch::empty({rows.size(0), kScaleGroup});
  float* const values = rows.data_ptr<float>() + k;
  float* const all_errors = errors.data_ptr<float>();
  uint8_t* const scale_bytes = scales.data_ptr<uint8_t>();
  const float* const u = factor.data_ptr<float>() + k * depth + k;
  parallel_for(rows.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* const row = values + n * depth;
      RoundedGroup best;
      best.loss = std::numeric_limits<double>::infinity();
      const int nearest = scale_bytes[n];
      for (int scale = std::max(nearest - 1, 0); scale <= std::min(nearest + 1, 255); ++scale) {
        RoundedGroup group;
        std::copy_n(row, kScaleGroup, group.values);
        group.round(std::exp2(static_cast<float>(scale) / 2 - 64), u, depth);
        if (group.loss < best.loss) {
          best = group;
          scale_bytes[n] = static_cast<uint8_t>(scale);
        }
      }
      std::copy_n(best.values, kScaleGroup, row);
      std::copy_n(best.errors, kScaleGroup, all_errors + n * kScaleGroup);
    }
  });
  return errors;
}

LoadOptions with_adapter(const std::filesystem::path& lora) {
  LoadOptions options;
  options.lora = lora;
  return options;
}

// Calibrates every packed matrix just before its first product.
class Calibrator : public ForwardObserver {
 public:
  Calibrator(const MixtralImpl& model, const std::filesystem::path& source, const std::filesystem::path& lora,
             const Progress& progress)
      : checkpoint_(source, model.config(), with_adapter(lora)), progress_(progress) {
    const auto tensors = model.named_parameters();
    for (const Parameter& parameter : model_parameters(model.config())) {
      const torch::Tensor& tensor = tensors[parameter.name];
      if (!is_packed(tensor)) continue;
      packed_[tensor.data_ptr()] = parameter;
      total_ += static_cast<uint64_t>(tensor.size(0));  // matrices: one for each expert
    }
  }

  void before_linear(const torch::Tensor& x, const torch::Tensor& weight) override {
    if (packed_.count(weight.data_ptr()) > 0) calibrate(weight, 0, read(weight), x);
  }

  void before_experts(const torch::Tensor& x, const torch::Tensor&, const torch::Tensor& topk_ids,
                      const torch::Tensor& gate_up_proj, const torch::Tensor& down_proj) override {
    const auto gate_up_rows = read(gate_up_proj), down_rows = read(down_proj);  // [E,2I,H], [E,H,I]
    for (int64_t e = 0; e < gate_up_proj.size(0); ++e) {
      const auto inputs = x.index_select(0, (topk_ids == e).any(1).nonzero().squeeze(1));  // [T,H]
      calibrate(gate_up_proj, e, gate_up_rows, inputs);
      const auto offs = torch::full({1}, inputs.size(0), torch::kInt32);
      calibrate(down_proj, e, down_rows, ops::swiglu(ops::grouped_gemm(inputs, gate_up_proj.narrow(0, e, 1), offs)));
    }
  }

 private:
  // The weights of a packed parameter as the checkpoint has them, f32 [E,N,K]
  torch::Tensor read(const torch::Tensor& packed) const {
    const Parameter& parameter = packed_.at(packed.data_ptr());
    torch::OrderedDict<std::string, torch::Tensor> plain;
    plain.insert(parameter.name, torch::empty(parameter.shape));
    checkpoint_.read_into(plain, Packing::kNone, nullptr);
    return plain[parameter.name].view({-1, *(parameter.shape.end() - 2), parameter.shape.back()});
  }

  // packed [E,N/32,...], rows [E,N,K], inputs [T,K] of expert e
  void calibrate(const torch::Tensor& packed, int64_t e, const torch::Tensor& rows, const torch::Tensor& inputs) {
    const auto gram = gram_matrix(inputs);
    const double mean = gram.diagonal().mean().item<double>();
    if (!std::isfinite(mean)) {
      throw std::runtime_error("calibrate: inputs of " + packed_.at(packed.data_ptr()).name +
                               " must be finite, got inf or NaN");
    }
    if (mean > 0) packed[e].copy_(pack_rows_calibrated(rows[e], gram));
    if (progress_) progress_(++done_, total_);
  }

  const Checkpoint checkpoint_;
  const Progress& progress_;
  std::map<const void*, Parameter> packed_;  // the packed parameters, by the address of their data
  uint64_t done_ = 0, total_ = 0;
};

// The most memory that a pass over `tokens` tokens needs beside the model: activations in bf16, a layer's weights in
// f32, and a Gram matrix with its factor in f64.
double working_bytes(const Config& config, int64_t tokens) {
  const auto hidden = static_cast<double>(config.hidden_size), inner = static_cast<double>(config.intermediate_size);
  const auto experts = static_cast<double>(std::max<int64_t>(config.num_experts, 1));
  const auto copies = static_cast<double>(std::max<int64_t>(config.top_k, 1));
  const double token = 8 * hidden + 3 * inner + copies * (2 * hidden + inner);
  const double depth = std::max(hidden, inner);
  return 2 * token * static_cast<double>(tokens) + 4 * experts * 3 * hidden * inner + 36 * depth * depth;
}

}  // namespace

torch::Tensor gram_matrix(const torch::Tensor& inputs) {
  const auto gram = torch::zeros({inputs.size(1), inputs.size(1)});
  for (const auto& part : inputs.split(kGramTokens)) {
    const auto x = part.to(torch::kFloat32);
    gram.addmm_(x.t(), x);
  }
  return gram;
}

torch::Tensor pack_rows_calibrated(const torch::Tensor& rows, const torch::Tensor& gram) {
  const int64_t count = rows.size(0), depth = rows.size(1);
  const auto factor = inverse_factor(gram);
  const auto values = rows.clone(torch::MemoryFormat::Contiguous);  // rounded from the left, compensated to the right
  const auto scales = torch::empty({count, depth / kScaleGroup}, torch::kUInt8);
  for (int64_t k = 0; k < depth; k += kScaleGroup) {
    const int64_t after = k + kScaleGroup, rest = depth - after;
    const auto group_scales = int4_scales(values.narrow(1, k, kScaleGroup));
    const auto errors = round_group(values, k, group_scales, factor);
    scales.select(1, k / kScaleGroup).copy_(group_scales);
    if (rest > 0)
      values.narrow(1, after, rest).addmm_(errors, factor.narrow(0, k, kScaleGroup).narrow(1, after, rest), 1, -1);
  }
  return ops::pack_weight(values.unsqueeze(0), "int4", scales.unsqueeze(0)).squeeze(0);
}

void calibrate(MixtralImpl& model, const std::filesystem::path& source, int64_t bos, const std::vector<int64_t>& ids,
               const Progress& progress, const std::filesystem::path& lora) {
  model.require_whole("calibrate");
  const Config& config = model.config();
  if (model.weight_type().packing != Packing::kInt4 || !config.quantization.empty()) {
    throw std::invalid_argument("calibrate: model must be int4 and its checkpoint not quantised");
  }
  if (ids.empty()) throw std::invalid_argument("calibrate: text must not be empty");
  model.check_ids(&bos, 1);
  model.check_ids(ids.data(), static_cast<int64_t>(ids.size()));

  const auto length = static_cast<size_t>(std::clamp<int64_t>(config.max_position - 1, 1, kSequenceTokens - 1));
  std::vector<std::vector<int64_t>> sequences;
  for (size_t begin = 0; begin < ids.size(); begin += length) {
    sequences.push_back({bos});
    const auto first = ids.begin() + static_cast<int64_t>(begin);
    const auto count = static_cast<int64_t>(std::min(length, ids.size() - begin));
    sequences.back().insert(sequences.back().end(), first, first + count);
  }
  Batch batch = packed_batch(sequences, torch::kCPU);
  check_memory("calibrating", working_bytes(config, batch.input_ids.size(0)), "cpu");

  Calibrator calibrator(model, source, lora, progress);
  batch.observer = &calibrator;
  const auto hidden = model.hidden_states(batch);  // [T,H]
  // The logits are not computed: they would be large. The inputs of lm_head are all here.
  const auto parameters = model.named_parameters();
  if (const torch::Tensor* lm_head = parameters.find("lm_head")) calibrator.before_linear(hidden, *lm_head);
}

}  // namespace mixtral
