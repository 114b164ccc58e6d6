#include "sampled_weights.h"

#include <algorithm>
#include <string>
#include <vector>

#include "../io/hash64.h"
#include "parameters.h"
#include "transformer.h"

namespace mixtral {
namespace {

constexpr int64_t kSampledRows = 64, kSampledValues = 64;  // of a parameter, of a row

int64_t step_of(int64_t count, int64_t samples) { return std::max<int64_t>(count / samples, 1); }

// Of the ranks of this stage before this one.
std::vector<RowRange> rows_held_before(const Parameter& parameter, const Config& config, Placement of) {
  std::vector<RowRange> held;
  while (of.tensor_rank-- > 0)
    for (const RowRange& rows : shard_of(parameter, config, of).rows) held.push_back(rows);
  return held;
}

// Of the values of a row or block, those to sample from. A layout that cuts the columns of the down projections leaves
// the first ones on its first rank: one of a row, or a step of a block. Nothing of a block of int8 or fp8, whose scales
// are of the columns that a rank has.
int64_t sampled_width(const Parameter& parameter, const torch::Tensor& own, int64_t width) {
  if (parameter.cut != Cut::kDown) return width;
  if (!is_packed(own)) return 1;
  return own.dim() == 4 ? own.size(-1) : 0;
}

// own: the part of the parameter that this rank holds. Its rows are hashed, or blocks of rows where it is packed.
uint64_t sample_of(const Parameter& parameter, const torch::Tensor& own, const Config& config,
                   const Placement& placement) {
  const bool packed = is_packed(own);
  const int64_t unit = packed ? kPackedRows : 1;
  const int64_t step = step_of(parameter.size() / parameter.shape.back() / unit, kSampledRows);
  const auto before = rows_held_before(parameter, config, placement);
  std::vector<int64_t> numbers, at;  // in the whole parameter, in `own`
  int64_t next = 0;
  for (const auto& [begin, end] : shard_of(parameter, config, placement).rows) {
    for (int64_t row = begin; row < end; row += unit, ++next) {
      const auto holds = [row](const RowRange& rows) { return rows.begin <= row && row < rows.end; };
      if (row / unit % step != 0 || std::any_of(before.begin(), before.end(), holds)) continue;
      numbers.push_back(row);
      at.push_back(next);
    }
  }
  if (at.empty()) return 0;
  const auto rows = packed ? own.flatten(0, 1).flatten(1) : own.view({-1, own.size(-1)});
  const int64_t width = sampled_width(parameter, own, rows.size(1));
  const auto sampled = rows.slice(1, 0, width, step_of(width, kSampledValues))
                           .index_select(0, torch::tensor(at, torch::kInt64).to(own.device()))
                           .cpu()
                           .contiguous();
  uint64_t sum = 0;
  for (size_t i = 0; i < at.size(); ++i) {
    const auto row = sampled[static_cast<int64_t>(i)];
    Hash64 hash;
    hash.add(parameter.name + " " + std::to_string(numbers[i]) + " ");
    hash.add(row.data_ptr(), row.nbytes());
    sum += hash.value();
  }
  return sum;
}

}  // namespace

uint64_t sampled_weights(const MixtralImpl& model) {
  const torch::NoGradGuard no_grad;
  const Config& config = model.config();
  const Placement& placement = model.placement();
  const auto own = model.named_parameters();
  uint64_t sum = 0;
  for (const Parameter& parameter : placed_parameters(config, placement)) {
    const bool is_copy = parameter.name == "embed_tokens" && !placement.is_first_stage();  // which is the head too
    if (!is_copy) sum += sample_of(parameter, own[parameter.name], config, placement);
  }
  return sum;
}

}  // namespace mixtral
