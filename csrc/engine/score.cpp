#include "score.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"
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

std::vector<double> token_logprobs(MixtralImpl& model, int64_t bos, const std::vector<int64_t>& ids,
                                   const ScoreOptions& options) {
  const Config& config = model.config();
  const auto total = static_cast<int64_t>(ids.size());
  require(total > 0, "score: text must not be empty");
  require(options.ctx_size >= 0, "score: ctx_size must be >= 0, got " + std::to_string(options.ctx_size));
  require(options.chunk_size > 0, "score: chunk_size must be > 0, got " + std::to_string(options.chunk_size));
  model.check_ids(&bos, 1);
  model.check_ids(ids.data(), total);

  const int64_t segment = std::min(total, options.ctx_size > 0 ? options.ctx_size : config.max_position);
  const int64_t chunk = std::min(options.chunk_size, segment);
  const int64_t pages = RollingKVCache::pages_needed(config, kPageSize, chunk, segment);
  RollingKVCache cache(config, {kPageSize, pages, chunk, model.device(), model.dtype()});

  std::vector<double> logprobs(ids.size());
  int64_t sequence = -1;
  for (int64_t begin = 0, end = 0; begin < total; begin = end) {
    const int64_t segment_begin = begin / segment * segment;
    if (begin == segment_begin) {
      if (sequence >= 0) cache.remove_sequence(sequence);
      sequence = cache.add_sequence();
    }
    end = std::min({begin + chunk, segment_begin + segment, total});
    // Each target in [begin, end) is predicted from the token before it; the first of a segment, from BOS.
    std::vector<int64_t> inputs{begin == segment_begin ? bos : ids[static_cast<size_t>(begin) - 1]};
    inputs.insert(inputs.end(), ids.begin() + begin, ids.begin() + end - 1);
    const auto hidden = model.hidden_states(cache.prepare({{sequence, std::move(inputs)}}), &cache);
    gather_logprobs(model.logits(hidden).to(torch::kCPU), ids.data() + begin, logprobs.data() + begin);
    if (options.progress) options.progress(end, total);
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
