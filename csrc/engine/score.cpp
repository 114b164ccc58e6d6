#include "score.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cached_sequence.h"
#include "require.h"
#include "sampling.h"

namespace mixtral {
namespace {

// logits f32 [T,vocab], targets [T] -> logprobs [T]: of targets[t] under row t.
void gather_logprobs(const torch::Tensor& logits, const int64_t* targets, double* logprobs) {
  const int64_t vocab = logits.size(1);
  const float* const rows = logits.data_ptr<float>();
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      logprobs[t] = token_logprob(rows + t * vocab, vocab, targets[t], /*top=*/0).logprob;
  });
}

}  // namespace

std::vector<double> window_logprobs(MixtralImpl& model, const std::vector<int64_t>& ids, int64_t targets,
                                    int64_t first_position, int64_t chunk_size,
                                    const std::function<void(int64_t inputs)>& after_chunk) {
  const int64_t inputs = static_cast<int64_t>(ids.size()) - 1, first = inputs - targets;  // the input before a target
  CachedSequence sequence(model, inputs, chunk_size, first_position);
  std::vector<double> logprobs(static_cast<size_t>(targets));
  for (int64_t begin = 0, end = 0; begin < inputs; begin = end) {
    end = std::min(begin + chunk_size, inputs);
    const auto hidden = sequence.feed({ids.begin() + begin, ids.begin() + end});
    if (end > first) {
      const int64_t from = std::max(begin, first);
      const auto logits = model.logits(hidden.narrow(0, from - begin, end - from)).to(torch::kCPU);
      gather_logprobs(logits, ids.data() + from + 1, logprobs.data() + from - first);
    }
    if (after_chunk) after_chunk(end - begin);
  }
  return logprobs;
}

std::vector<double> token_logprobs(MixtralImpl& model, int64_t bos, const std::vector<int64_t>& ids,
                                   const ScoreOptions& options) {
  const auto total = static_cast<int64_t>(ids.size());
  require(total > 0, "score: text must not be empty");
  require(options.ctx_size >= 0, "score: ctx_size must be >= 0, got " + std::to_string(options.ctx_size));
  require(options.chunk_size > 0, "score: chunk_size must be > 0, got " + std::to_string(options.chunk_size));
  model.check_ids(&bos, 1);
  model.check_ids(ids.data(), total);

  const int64_t segment = std::min(total, options.ctx_size > 0 ? options.ctx_size : model.config().max_position);
  int64_t done = 0;
  const auto after_chunk = [&](int64_t inputs) {
    done += inputs;
    if (options.progress) options.progress(done, total);
  };
  std::vector<double> logprobs;
  for (int64_t begin = 0; begin < total; begin += segment) {
    const int64_t end = std::min(begin + segment, total);
    std::vector<int64_t> behind_bos{bos};
    behind_bos.insert(behind_bos.end(), ids.begin() + begin, ids.begin() + end);
    const auto scored = window_logprobs(model, behind_bos, end - begin, 0, options.chunk_size, after_chunk);
    logprobs.insert(logprobs.end(), scored.begin(), scored.end());
  }
  return logprobs;
}

Score score(MixtralImpl& model, const Tokenizer& tokenizer, const std::string& text, const ScoreOptions& options) {
  Score result;
  result.bytes = static_cast<int64_t>(text.size());
  const std::vector<double> logprobs = token_logprobs(model, tokenizer.bos_id(), tokenizer.encode(text), options);
  result.tokens = static_cast<int64_t>(logprobs.size());
  for (const double logprob : logprobs) result.negative_log_likelihood -= logprob;  // in the order of the text
  return result;
}

}  // namespace mixtral
