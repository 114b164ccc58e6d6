#include "continuations.h"

#include <algorithm>
#include <string>

#include "../model/parallel.h"
#include "packed_passes.h"
#include "require.h"
#include "sampling.h"

namespace mixtral {
namespace {

// A token to be predicted: from row `row` of the pass, for continuation `of`.
struct Target {
  int64_t row;
  size_t of;
  int64_t id;
};

// The inputs of the model: all ids but the last, which is only predicted.
std::vector<std::vector<int64_t>> inputs_of(const std::vector<Continuation>& continuations) {
  std::vector<std::vector<int64_t>> inputs;
  for (size_t i = 0; i < continuations.size(); ++i) {
    const auto& [ids, begin] = continuations[i];
    const auto length = static_cast<int64_t>(ids.size());
    require(1 <= begin && begin <= length, "score: the continuation of request " + std::to_string(i) +
                                               " must begin in [1, " + std::to_string(length) + "], got " +
                                               std::to_string(begin));
    inputs.emplace_back(ids.begin(), ids.end() - (begin < length ? 1 : 0));
  }
  return inputs;
}

// Adds the log-probabilities of the targets, given the model's normed rows hidden [T,H].
void add_scores(MixtralImpl& model, const torch::Tensor& hidden, const std::vector<Target>& targets,
                std::vector<ContinuationScore>& scores) {
  if (targets.empty()) return;
  std::vector<int64_t> rows;
  for (const Target& target : targets) rows.push_back(target.row);
  const auto chosen = hidden.index_select(0, torch::tensor(rows, torch::kInt64).to(hidden.device()));
  const auto logits = model.logits(chosen).to(torch::kCPU);
  const int64_t vocab = logits.size(1);
  std::vector<TokenLogprob> found(targets.size());
  parallel_for(logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto index = static_cast<size_t>(i);
      found[index] = token_logprob(logits.data_ptr<float>() + i * vocab, vocab, targets[index].id, /*top=*/1);
    }
  });
  for (size_t i = 0; i < targets.size(); ++i) {
    ContinuationScore& score = scores[targets[i].of];
    score.logprob += found[i].logprob;
    score.is_greedy = score.is_greedy && found[i].top.at(0).first == targets[i].id;
  }
}

}  // namespace

std::vector<ContinuationScore> score_continuations(MixtralImpl& model, const std::vector<Continuation>& continuations,
                                                   int64_t chunk_size,
                                                   const std::function<void(int64_t done, int64_t total)>& progress) {
  require(chunk_size > 0, "score: chunk_size must be > 0, got " + std::to_string(chunk_size));
  std::vector<ContinuationScore> scores(continuations.size());
  if (continuations.empty()) return scores;
  const auto inputs = inputs_of(continuations);
  check_sequences(model, inputs, [](size_t i) { return "score: request " + std::to_string(i); });
  int64_t total = 0, done = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    model.check_ids(continuations[i].ids.data(), static_cast<int64_t>(continuations[i].ids.size()));
    total += static_cast<int64_t>(inputs[i].size());
  }
  size_t of = 0;  // the input that the next row of a pass belongs to, and its place there
  int64_t place = 0;
  for_each_pass(model, inputs, std::min(chunk_size, total), [&](const Batch& batch, RollingKVCache& cache) {
    const int64_t rows = batch.input_ids.size(0);
    std::vector<Target> targets;
    for (int64_t row = 0; row < rows; ++row) {
      const auto& [ids, begin] = continuations[of];
      if (place + 1 >= begin && place + 1 < static_cast<int64_t>(ids.size()))
        targets.push_back({row, of, ids[static_cast<size_t>(place) + 1]});
      if (++place < static_cast<int64_t>(inputs[of].size())) continue;
      ++of;
      place = 0;
    }
    add_scores(model, model.hidden_states(batch, &cache), targets, scores);
    if (progress) progress(done += rows, total);
  });
  return scores;
}

}  // namespace mixtral
