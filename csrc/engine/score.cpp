#include "score.h"

#include <algorithm>

#include "../model/parallel.h"
#include "cached_sequence.h"
#include "require.h"
#include "routing_observer.h"
#include "sampling.h"

namespace mixtral {
namespace {

// logits f32 [T,vocab], targets [T] -> logprobs [T]: of targets[t] under row t.
void gather_logprobs(const torch::Tensor& logits, const int64_t* targets, double* logprobs) {
  const int64_t vocab = logits.size(1);
  const float* const rows = logits.data_ptr<float>();
  parallel_for(logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      logprobs[t] = token_logprob(rows + t * vocab, vocab, targets[t], /*top=*/0).logprob;
  });
}

// inputs: the tokens of one pass, the first at `position`; logits f32 [T,vocab].
void add_to_trace(Trace& trace, RoutingObserver& observer, const std::vector<int64_t>& inputs, int64_t position,
                  const torch::Tensor& logits) {
  const auto predicted = logits.argmax(1).to(torch::kInt32);
  for (size_t i = 0; i < inputs.size(); ++i) {
    trace.token_id.push_back(static_cast<int32_t>(inputs[i]));
    trace.predicted_id.push_back(predicted.data_ptr<int32_t>()[i]);
    trace.position.push_back(static_cast<int32_t>(position) + static_cast<int32_t>(i));
  }
  trace.doc.resize(trace.token_id.size());
  trace.domain.resize(trace.token_id.size());
  observer.append_to(trace.routing, 0, predicted.numel());
}

}  // namespace

std::vector<double> token_logprobs(MixtralImpl& model, int64_t bos, const std::vector<int64_t>& ids,
                                   const ScoreOptions& options) {
  const Config& config = model.config();
  const auto total = static_cast<int64_t>(ids.size());
  require(total > 0, "score: text must not be empty");
  require(options.ctx_size >= 0, "score: ctx_size must be >= 0, got " + std::to_string(options.ctx_size));
  require(options.chunk_size > 0, "score: chunk_size must be > 0, got " + std::to_string(options.chunk_size));
  if (options.replay) check_same_model(*options.replay, model);
  model.check_ids(&bos, 1);
  model.check_ids(ids.data(), total);

  const int64_t segment = std::min(total, options.ctx_size > 0 ? options.ctx_size : config.max_position);
  const int64_t chunk = std::min(options.chunk_size, segment);
  RollingKVCache cache = cache_of_one(model, segment, chunk, options.kv_memory);

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
    RoutingObserver observer(config, /*keep_logits=*/false);
    if (options.replay) {
      check_same_tokens(*options.replay, static_cast<size_t>(begin), inputs);
      observer.force(options.replay->routing, begin, end - begin);
    }
    Batch batch = cache.prepare({{sequence, inputs}});
    if (options.trace || options.replay) batch.routing = &observer;
    if (options.replay) batch.experts_per_token = options.replay->routing.top_k;
    const auto logits = model.logits(model.hidden_states(batch, &cache)).to(torch::kCPU);
    gather_logprobs(logits, ids.data() + begin, logprobs.data() + begin);
    if (options.trace) add_to_trace(*options.trace, observer, inputs, begin - segment_begin, logits);
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
