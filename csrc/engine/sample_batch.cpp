#include "sample_batch.h"

#include <algorithm>
#include <limits>

namespace mixtral {
namespace {

using torch::Tensor;

bool is_greedy(const Sampler* sampler) { return sampler->params().temperature == 0; }

template <typename T>
Tensor beside(const Tensor& like, const std::vector<T>& values) {
  return torch::tensor(values, c10::CppTypeToScalarType<T>::value).to(like.device());
}

// logits [B,vocab] -> the same after each row's penalties, biases and banned tokens.
Tensor adjusted(const Tensor& logits, const std::vector<Sampler*>& samplers) {
  const int64_t vocab = logits.size(1);
  std::vector<int64_t> places, banned;  // in the flattened logits
  std::vector<float> penalties, offsets;
  for (size_t row = 0; row < samplers.size(); ++row) {
    const int64_t begin = static_cast<int64_t>(row) * vocab;
    for (const auto& [id, adjustment] : samplers[row]->adjustments()) {
      if (id < 0 || id >= vocab) continue;
      places.push_back(begin + id);
      penalties.push_back(adjustment.penalty);
      offsets.push_back(adjustment.offset);
    }
    for (const int64_t id : samplers[row]->banned())
      if (id >= 0 && id < vocab) banned.push_back(begin + id);
  }
  Tensor scores = logits.flatten();
  if (!places.empty()) {
    const Tensor index = beside(logits, places), penalty = beside(logits, penalties);
    const Tensor score = scores.index_select(0, index);
    scores = scores.index_copy(0, index,
                               torch::where(score < 0, score * penalty, score / penalty) + beside(logits, offsets));
  }
  if (!banned.empty()) scores = scores.index_fill(0, beside(logits, banned), -std::numeric_limits<double>::infinity());
  return scores.view_as(logits);
}

// scores [B,vocab], highest [B,1] -> drawn tokens [B].
Tensor draw(const Tensor& scores, const Tensor& highest, const std::vector<Sampler*>& samplers) {
  const int64_t vocab = scores.size(1);
  std::vector<double> numbers;  // five of each row, in one copy
  for (const Sampler* sampler : samplers) {
    const SamplingParams& params = sampler->params();
    const bool cuts_k = params.top_k > 0 && params.top_k < vocab;
    numbers.insert(
        numbers.end(),
        {is_greedy(sampler) ? 1 : params.temperature, static_cast<double>(cuts_k ? params.top_k : vocab),
         params.top_p < 1 ? params.top_p : std::numeric_limits<double>::infinity(), params.min_p, sampler->uniform()});
  }
  const auto columns = beside(scores, numbers).view({-1, 5, 1}).unbind(1);  // [B,1] each
  const Tensor &temperature = columns[0], &top_k = columns[1], &top_p = columns[2], &min_p = columns[3];

  const Tensor likelihood = ((scores.to(torch::kFloat64) - highest) / temperature).exp();
  // Rows with top-k or top-p are sorted, most likely first. The others get equal keys, which keep the order of ids.
  const Tensor sorted = (top_k < vocab) | torch::isfinite(top_p);
  const Tensor keys = torch::where(sorted, scores, torch::zeros_like(scores));
  const Tensor ids = std::get<1>(torch::sort(keys, /*stable=*/true, /*dim=*/1, /*descending=*/true));
  Tensor weight = likelihood.gather(1, ids);
  weight = weight * (torch::arange(vocab, weight.options()) < top_k);
  const Tensor mass = weight.cumsum(1);
  const Tensor before = torch::constant_pad_nd(mass, {1, -1});  // of the tokens before each
  weight = weight * (before < top_p * mass.narrow(1, vocab - 1, 1)) * (weight >= min_p);

  const Tensor share = weight.cumsum(1), total = share.narrow(1, vocab - 1, 1);
  // The first token whose share exceeds the target, and never one behind the last token of positive weight.
  const Tensor place = ((share <= columns[4] * total) & (share < total)).sum(1, /*keepdim=*/true);
  return ids.gather(1, place).squeeze(1);
}

}  // namespace

std::vector<int64_t> sample_batch(const Tensor& logits, const std::vector<Sampler*>& samplers) {
  const torch::NoGradGuard no_grad;
  const Tensor scores = adjusted(logits, samplers);
  const auto [highest, most_likely] =
      scores.max(1, /*keepdim=*/true);  // the first of equals; NaN counts as the highest
  Tensor tokens = most_likely.squeeze(1);
  if (!std::all_of(samplers.begin(), samplers.end(), is_greedy)) {
    std::vector<uint8_t> greedy;
    for (const Sampler* sampler : samplers) greedy.push_back(is_greedy(sampler));
    // A row without a finite maximum draws from NaN; its token is not used.
    tokens = torch::where(beside(scores, greedy) != 0, tokens, draw(scores, highest, samplers));
  }
  tokens = torch::where(torch::isfinite(highest.squeeze(1)), tokens, -1).to(torch::kCPU);
  std::vector<int64_t> result(tokens.data_ptr<int64_t>(), tokens.data_ptr<int64_t>() + tokens.numel());
  for (size_t row = 0; row < result.size(); ++row)
    if (result[row] >= 0) samplers[row]->take(result[row]);
  return result;
}

}  // namespace mixtral
