#include "model_runner.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "prompt_logprobs.h"
#include "routing_observer.h"
#include "sample_batch.h"

namespace mixtral {
namespace {

// The experts that the next `tokens` tokens of a sequence are forced to; null where its router decides.
void add_forced_rows(Sequence& sequence, int64_t tokens, std::vector<const uint8_t*>& rows) {
  for (int64_t i = sequence.computed; i < sequence.computed + tokens; ++i) {
    const Trace* const replay = sequence.replay.get();
    if (replay && i == sequence.replayed && i < replay->tokens() &&
        replay->token_id[static_cast<size_t>(i)] == sequence.ids[static_cast<size_t>(i)])
      ++sequence.replayed;
    rows.push_back(i < sequence.replayed ? replay->routing.experts_of(i) : nullptr);
  }
}

// None when nothing is counted, and no sequence of the plan is traced or replayed.
std::optional<RoutingObserver> observer_of(const std::vector<Scheduler::Chunk>& plan, const Config& config,
                                           bool counts) {
  const auto replays = [](const auto& chunk) {
    const Sequence& sequence = *chunk.sequence;
    return sequence.replay && sequence.computed <= sequence.replayed && sequence.computed < sequence.replay->tokens();
  };
  const auto traces = [](const auto& chunk) { return chunk.sequence->generation.trace != nullptr; };
  const bool forces = std::any_of(plan.begin(), plan.end(), replays);
  if (!counts && !forces && !std::any_of(plan.begin(), plan.end(), traces)) return std::nullopt;
  RoutingObserver observer(config, /*keep_logits=*/false);
  if (forces) {
    std::vector<const uint8_t*> rows;
    for (const auto& [sequence, tokens] : plan) add_forced_rows(*sequence, tokens, rows);
    observer.force(std::move(rows));
  }
  return observer;
}

void add_to_traces(RoutingObserver& observer, const std::vector<Scheduler::Chunk>& plan) {
  int64_t row = 0;
  for (const auto& [sequence, tokens] : plan) {
    if (Trace* const trace = sequence->generation.trace.get()) {
      const int64_t end = sequence->computed + tokens;
      const int64_t begin = std::clamp(trace->tokens(), sequence->computed, end);  // it has those before a preemption
      observer.append_to(trace->routing, row + begin - sequence->computed, end - begin);
      for (int64_t i = begin; i < end; ++i) {
        trace->token_id.push_back(static_cast<int32_t>(sequence->ids[static_cast<size_t>(i)]));
        trace->position.push_back(static_cast<int32_t>(i));
      }
      const auto size = static_cast<size_t>(trace->tokens());
      trace->predicted_id.resize(size, -1);
      trace->doc.resize(size);
      trace->domain.resize(size);
    }
    row += tokens;
  }
}

}  // namespace

ModelRunner::ModelRunner(Mixtral model, Options options)
    : model_(std::move(model)),
      routing_counts_(std::move(options.routing_counts)),
      uses_graphs_(options.cuda_graph && model_->device().is_cuda()),
      cache_(model_->config(), {options.page_size, options.num_pages, options.max_chunk, model_->device(),
                                model_->dtype(), uses_graphs_ ? DecodeGraphs::padding_tokens(options.max_batch) : 0}) {}

std::vector<std::pair<Sequence*, Sample>> ModelRunner::run(const std::vector<Scheduler::Chunk>& plan) {
  std::map<int64_t, std::vector<Scheduler::Chunk>> passes;
  for (const auto& chunk : plan) passes[chunk.sequence->experts_per_token].push_back(chunk);
  std::vector<std::pair<Sequence*, Sample>> samples;
  for (const auto& pass : passes)
    for (auto& sample : run_pass(pass.second)) samples.push_back(std::move(sample));
  return samples;
}

// All sequences have the same number of experts per token.
std::vector<std::pair<Sequence*, Sample>> ModelRunner::run_pass(const std::vector<Scheduler::Chunk>& plan) {
  std::vector<RollingKVCache::Chunk> chunks;
  std::vector<int64_t> rows;               // of the newest token of a sequence: they need logits
  std::vector<Sequence*> sequences;        // of these rows
  std::vector<PromptToken> prompt_tokens;  // their rows need logits too
  int64_t total = 0;
  for (const auto& [sequence, tokens] : plan) {
    const auto begin = sequence->ids.begin() + sequence->computed;
    chunks.push_back({sequence->cache_id, {begin, begin + tokens}});
    add_prompt_tokens(*sequence, tokens, total, prompt_tokens);
    total += tokens;
    if (sequence->computed + tokens < sequence->length()) continue;
    rows.push_back(total - 1);
    sequences.push_back(sequence);
  }
  for (const PromptToken& token : prompt_tokens) rows.push_back(token.row);
  std::optional<RoutingObserver> observer = observer_of(plan, model_->config(), routing_counts_ != nullptr);
  const auto logits =
      forward(chunks, rows, plan[0].sequence->experts_per_token, observer ? &observer.value() : nullptr);
  if (observer) add_to_traces(*observer, plan);
  if (routing_counts_) observer->count_in(*routing_counts_);
  for (const auto& [sequence, tokens] : plan) sequence->computed += tokens;
  if (rows.empty()) return {};
  const auto count = static_cast<int64_t>(sequences.size());
  std::vector<std::pair<Sequence*, Sample>> result;
  if (!prompt_tokens.empty()) result = set_prompt_logprobs(prompt_tokens, logits.slice(0, count));
  for (size_t i = 0; i < sequences.size(); ++i)
    if (Trace* const trace = sequences[i]->generation.trace.get())
      trace->predicted_id.back() = logits[static_cast<int64_t>(i)].argmax().item<int32_t>();
  const auto unconstrained = hold_constrained(sequences, logits.slice(0, 0, count));
  if (sequences.empty()) return result;
  std::vector<Sample> samples = sample(sequences, unconstrained);
  for (size_t i = 0; i < samples.size(); ++i) result.emplace_back(sequences[i], std::move(samples[i]));
  return result;
}

// The hidden rows `rows` of the batch become logits: f32 [rows, vocab].
torch::Tensor ModelRunner::forward(const std::vector<RollingKVCache::Chunk>& chunks, const std::vector<int64_t>& rows,
                                   int64_t experts_per_token, ForwardObserver* observer) {
  const auto one_token = [](const RollingKVCache::Chunk& chunk) { return chunk.input_ids.size() == 1; };
  const bool as_captured = !observer && experts_per_token == model_->config().top_k;
  const bool in_order = std::is_sorted(rows.begin(), rows.end());
  if (uses_graphs_ && as_captured && chunks.size() <= DecodeGraphs::kMaxSequences && rows.size() == chunks.size() &&
      in_order && std::all_of(chunks.begin(), chunks.end(), one_token)) {
    if (!graphs_) graphs_.emplace(*model_, cache_);
    return graphs_->logits(chunks);
  }
  Batch batch = cache_.prepare(chunks);
  batch.observer = observer;
  batch.experts_per_token = experts_per_token;
  auto hidden = model_->hidden_states(batch, &cache_);
  if (rows.empty()) return {};
  if (static_cast<int64_t>(rows.size()) < hidden.size(0) || !in_order)
    hidden = hidden.index_select(0, torch::tensor(rows, torch::kInt64).to(hidden.device()));
  return model_->logits(hidden);
}

// Moves the rows of constrained sequences out of the logits f32 [rows, vocab], and these sequences out of the list.
torch::Tensor ModelRunner::hold_constrained(std::vector<Sequence*>& sequences, const torch::Tensor& logits) const {
  std::vector<int64_t> others;
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (!sequences[i]->constrained) {
      others.push_back(static_cast<int64_t>(i));
      continue;
    }
    const auto row = logits[static_cast<int64_t>(i)].to(torch::kCPU);
    sequences[i]->held_logits.assign(row.data_ptr<float>(), row.data_ptr<float>() + row.numel());
  }
  if (others.size() == sequences.size()) return logits;
  const auto constrained = [](const Sequence* sequence) { return sequence->constrained; };
  sequences.erase(std::remove_if(sequences.begin(), sequences.end(), constrained), sequences.end());
  return logits.index_select(0, torch::tensor(others, torch::kInt64).to(logits.device()));
}

Sample ModelRunner::sample_held(Sequence& sequence) const {
  std::vector<float> logits = std::exchange(sequence.held_logits, {});
  Sample sample = sample_row(sequence, -1, torch::from_blob(logits.data(), {model_->config().vocab_size}));
  sequence.allowed.clear();
  return sample;
}

// logits f32 [rows, vocab]: one row for each sequence.
std::vector<Sample> ModelRunner::sample(const std::vector<Sequence*>& sequences, torch::Tensor logits) {
  const auto wants_logprobs = [](const Sequence* sequence) { return sequence->params.logprobs > 0; };
  std::vector<int64_t> ids(sequences.size(), -1);
  if (logits.is_cpu() || std::any_of(sequences.begin(), sequences.end(), wants_logprobs)) {
    logits = logits.to(torch::kCPU);
  } else {
    std::vector<Sampler*> samplers;
    for (Sequence* sequence : sequences) samplers.push_back(&sequence->sampler);
    ids = sample_batch(logits, samplers);
  }
  std::vector<Sample> samples;
  for (size_t i = 0; i < sequences.size(); ++i) {
    samples.push_back(sample_row(*sequences[i], ids[i], logits[static_cast<int64_t>(i)]));
  }
  return samples;
}

// token_id -1: not picked from the logits [vocab] yet.
Sample ModelRunner::sample_row(Sequence& sequence, int64_t token_id, const torch::Tensor& logits) const {
  const int64_t vocab = model_->config().vocab_size;
  Sample sample;
  try {
    sample.token_id = token_id;
    if (token_id < 0)
      sample.token_id = sequence.sampler.next(logits.to(torch::kCPU).data_ptr<float>(), vocab, sequence.allowed);
    if (sequence.params.logprobs > 0)
      sample.logprob = token_logprob(logits.data_ptr<float>(), vocab, sample.token_id, sequence.params.logprobs);
  } catch (const std::runtime_error& error) {  // NaN: the neighbours go on
    sample.error = error.what();
  }
  return sample;
}

}  // namespace mixtral
