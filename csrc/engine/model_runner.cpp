#include "model_runner.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "errors.h"
#include "prompt_logprobs.h"
#include "routing_observer.h"
#include "sample_batch.h"

namespace mixtral {
namespace {

// The experts that the next `tokens` tokens of a sequence are forced to, if any.
void add_forced_rows(Sequence& sequence, int64_t tokens, std::vector<RoutingObserver::ForcedRow>& rows) {
  for (int64_t i = sequence.computed; i < sequence.computed + tokens; ++i) {
    const Trace* const replay = sequence.replay.get();
    if (replay && i == sequence.replayed && i < replay->tokens() &&
        replay->token_id[static_cast<size_t>(i)] == sequence.ids[static_cast<size_t>(i)])
      ++sequence.replayed;
    rows.push_back({i < sequence.replayed ? replay->routing.experts_of(i) : nullptr, sequence.experts_per_token});
  }
}

// None when nothing is counted, and no sequence of the plan is traced or replayed.
std::unique_ptr<RoutingObserver> observer_of(const std::vector<Scheduler::Chunk>& plan, const Config& config,
                                             bool counts) {
  const auto replays = [](const auto& chunk) {
    const Sequence& sequence = *chunk.sequence;
    return sequence.replay && sequence.computed <= sequence.replayed && sequence.computed < sequence.replay->tokens();
  };
  const auto traces = [](const auto& chunk) { return chunk.sequence->generation.trace != nullptr; };
  const bool forces = std::any_of(plan.begin(), plan.end(), replays);
  if (!counts && !forces && !std::any_of(plan.begin(), plan.end(), traces)) return nullptr;
  auto observer = std::make_unique<RoutingObserver>(config, /*keep_logits=*/false);
  if (forces) {
    std::vector<RoutingObserver::ForcedRow> rows;
    for (const auto& [sequence, tokens] : plan) {
      add_forced_rows(*sequence, tokens, rows);
      rows.resize(rows.size() + sequence->draft.size());
    }
    observer->force(std::move(rows));
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
    row += tokens + static_cast<int64_t>(sequence->draft.size());
  }
}

RowsByExperts rows_by_experts(const std::vector<Scheduler::Chunk>& plan) {
  RowsByExperts rows;
  int64_t row = 0;
  for (const auto& [sequence, tokens] : plan)
    for (int64_t i = 0; i < tokens + static_cast<int64_t>(sequence->draft.size()); ++i)
      rows[sequence->experts_per_token].push_back(row++);
  return rows;
}

// x [T,n] -> [rows,n]
torch::Tensor select_rows(const torch::Tensor& x, const std::vector<int64_t>& rows) {
  if (static_cast<int64_t>(rows.size()) == x.size(0) && std::is_sorted(rows.begin(), rows.end())) return x;
  return x.index_select(0, torch::tensor(rows, torch::kInt64).to(x.device()));
}

}  // namespace

ModelRunner::ModelRunner(Mixtral model, Options options)
    : model_(std::move(model)),
      routing_counts_(std::move(options.routing_counts)),
      uses_graphs_(options.cuda_graph && model_->device().is_cuda() && !model_->expert_runner()),
      cache_(model_->config(), {options.page_size, options.num_pages, options.max_chunk, model_->device(),
                                model_->dtype(), uses_graphs_ ? DecodeGraphs::padding_tokens(options.max_batch) : 0}) {}

// A pass that was computed.
struct ModelRunner::Pass {
  std::vector<Sequence*> sequences;  // all of whose tokens are computed now
  std::vector<int64_t> first_rows;   // of the logits: that of a sequence's newest token; those of its draft follow
  std::vector<PromptToken> prompt_tokens;     // their rows of the logits are the last ones
  torch::Tensor logits;                       // f32 [rows, vocab]; undefined: no row needs any
  std::unique_ptr<RoutingObserver> observer;  // or none
};

std::vector<Step> ModelRunner::run(const std::vector<Scheduler::Chunk>& plan) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<Step> steps = compute(plan);
  pass_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return steps;
}

std::vector<Step> ModelRunner::compute(const std::vector<Scheduler::Chunk>& plan) {
  try {
    std::optional<Pass> pass;
    try {
      pass = forward(plan);
    } catch (const std::exception& error) {
      roll_back(plan);
      if (!is_out_of_memory(error) || plan.size() == 1) throw;
    }
    if (!pass) return compute_halves(plan);
    if (pass->observer) add_to_traces(*pass->observer, plan);
    for (const auto& [sequence, tokens] : plan) sequence->computed += tokens;
    std::vector<Step> steps = finish(*pass);
    if (routing_counts_) count_routing(*pass, plan, steps);
    return steps;
  } catch (...) {
    for (const auto& chunk : plan) chunk.sequence->error = std::current_exception();
    return {};
  }
}

std::vector<Step> ModelRunner::compute_halves(const std::vector<Scheduler::Chunk>& plan) {
  const auto middle = plan.begin() + static_cast<std::ptrdiff_t>(plan.size() / 2);
  std::vector<Step> steps = compute({plan.begin(), middle});
  for (Step& step : compute({middle, plan.end()})) steps.push_back(std::move(step));
  return steps;
}

ModelRunner::Pass ModelRunner::forward(const std::vector<Scheduler::Chunk>& plan) {
  Pass pass;
  std::vector<RollingKVCache::Chunk> chunks;
  std::vector<int64_t> rows;  // those that need logits: the newest token of a sequence and its draft
  int64_t total = 0;
  for (const auto& [sequence, tokens] : plan) {
    const auto begin = sequence->ids.begin() + sequence->computed;
    std::vector<int64_t> ids(begin, begin + tokens);
    add_prompt_tokens(*sequence, tokens, total, pass.prompt_tokens);
    ids.insert(ids.end(), sequence->draft.begin(), sequence->draft.end());
    total += static_cast<int64_t>(ids.size());
    chunks.push_back({sequence->cache_id, std::move(ids)});
    if (sequence->computed + tokens < sequence->length()) continue;
    pass.sequences.push_back(sequence);
    pass.first_rows.push_back(static_cast<int64_t>(rows.size()));
    for (auto row = total - 1 - static_cast<int64_t>(sequence->draft.size()); row < total; ++row) rows.push_back(row);
  }
  for (const PromptToken& token : pass.prompt_tokens) rows.push_back(token.row);
  pass.observer = observer_of(plan, model_->config(), routing_counts_ != nullptr);
  pass.logits = logits(chunks, rows, rows_by_experts(plan), pass.observer.get());
  return pass;
}

// The cache forgets what a pass that failed was to write.
void ModelRunner::roll_back(const std::vector<Scheduler::Chunk>& plan) {
  for (const auto& chunk : plan) cache_.truncate(chunk.sequence->cache_id, chunk.sequence->computed);
}

std::vector<Step> ModelRunner::finish(Pass& pass) {
  if (!pass.logits.defined()) return {};
  const auto prompt_rows = static_cast<int64_t>(pass.prompt_tokens.size());
  std::vector<Step> steps;
  if (prompt_rows > 0) {
    const auto failed =
        set_prompt_logprobs(pass.prompt_tokens, pass.logits.slice(0, pass.logits.size(0) - prompt_rows));
    for (const auto& [sequence, sample] : failed) steps.push_back({sequence, {sample}});
  }
  for (size_t i = 0; i < pass.sequences.size(); ++i)
    if (Trace* const trace = pass.sequences[i]->generation.trace.get())
      trace->predicted_id.back() = pass.logits[pass.first_rows[i]].argmax().item<int32_t>();
  hold_constrained(pass);
  for (Step& step : sample_and_compare(pass)) steps.push_back(std::move(step));
  return steps;
}

// Of the tokens of the plan and the guesses that held.
void ModelRunner::count_routing(Pass& pass, const std::vector<Scheduler::Chunk>& plan, const std::vector<Step>& steps) {
  std::map<const Sequence*, int64_t> held;
  for (const Step& step : steps) held[step.sequence] = static_cast<int64_t>(step.samples.size()) - 1;
  int64_t row = 0;
  for (const auto& [sequence, tokens] : plan) {
    pass.observer->count_in(*routing_counts_, row, tokens + held[sequence]);
    row += tokens + static_cast<int64_t>(sequence->draft.size());
  }
}

// Takes constrained sequences out of the pass; they keep their logits.
void ModelRunner::hold_constrained(Pass& pass) const {
  std::vector<Sequence*> others;
  std::vector<int64_t> rows;
  for (size_t i = 0; i < pass.sequences.size(); ++i) {
    Sequence* const sequence = pass.sequences[i];
    if (!sequence->constrained) {
      others.push_back(sequence);
      rows.push_back(pass.first_rows[i]);
      continue;
    }
    const auto row = pass.logits[pass.first_rows[i]].to(torch::kCPU);
    sequence->held_logits.assign(row.data_ptr<float>(), row.data_ptr<float>() + row.numel());
  }
  pass.sequences = std::move(others);
  pass.first_rows = std::move(rows);
}

// Picks a token from the row of each sequence; where it is the one that the draft guessed, from the next row too.
std::vector<Step> ModelRunner::sample_and_compare(const Pass& pass) {
  std::vector<Step> steps;
  for (Sequence* sequence : pass.sequences) steps.push_back({sequence, {}});
  std::vector<size_t> active(steps.size());  // indices of steps
  std::iota(active.begin(), active.end(), size_t{0});
  for (size_t round = 0; !active.empty(); ++round) {
    std::vector<Sequence*> sequences;
    std::vector<int64_t> rows;
    for (const size_t i : active) {
      sequences.push_back(steps[i].sequence);
      rows.push_back(pass.first_rows[i] + static_cast<int64_t>(round));
    }
    std::vector<Sample> samples = sample(sequences, select_rows(pass.logits, rows));
    std::vector<size_t> held;
    for (size_t i = 0; i < active.size(); ++i) {
      const auto& draft = sequences[i]->draft;
      if (round < draft.size() && samples[i].token_id == draft[round]) held.push_back(active[i]);
      steps[active[i]].samples.push_back(std::move(samples[i]));
    }
    active = std::move(held);
  }
  for (const Step& step : steps) {
    if (step.sequence->draft.empty()) continue;
    step.sequence->computed += static_cast<int64_t>(step.samples.size()) - 1;
    cache_.truncate(step.sequence->cache_id, step.sequence->computed);
  }
  return steps;
}

// The hidden rows `rows` of the batch become logits: f32 [rows, vocab].
torch::Tensor ModelRunner::logits(const std::vector<RollingKVCache::Chunk>& chunks, const std::vector<int64_t>& rows,
                                  const RowsByExperts& experts, ForwardObserver* observer) {
  const auto one_token = [](const RollingKVCache::Chunk& chunk) { return chunk.input_ids.size() == 1; };
  const bool as_captured = !observer && experts.size() == 1 && experts.begin()->first == model_->config().top_k;
  const bool in_order = std::is_sorted(rows.begin(), rows.end());
  if (uses_graphs_ && as_captured && chunks.size() <= DecodeGraphs::kMaxSequences && rows.size() == chunks.size() &&
      in_order && std::all_of(chunks.begin(), chunks.end(), one_token)) {
    if (!graphs_) graphs_.emplace(*model_, cache_);
    return graphs_->logits(chunks);
  }
  Batch batch = cache_.prepare(chunks);
  batch.observer = observer;
  batch.experts_per_token = experts.begin()->first;
  if (experts.size() > 1)
    for (const auto& [count, of] : experts)
      batch.rows_by_experts[count] = torch::tensor(of, torch::kInt64).to(model_->device());
  const auto hidden = model_->hidden_states(batch, &cache_);
  if (rows.empty()) return {};
  return model_->logits(select_rows(hidden, rows));
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
  } catch (...) {
    sequence.error = std::current_exception();
  }
  return sample;
}

}  // namespace mixtral
