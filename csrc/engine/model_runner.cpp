#include "model_runner.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "../distributed/communicator.h"
#include "errors.h"
#include "pass_routing.h"
#include "prompt_logprobs.h"
#include "sample_batch.h"

namespace mixtral {
namespace {

// Where sequences differ in their numbers of experts, the rows with each.
void set_experts(Batch& batch, const std::vector<Scheduler::Chunk>& plan, torch::Device device) {
  std::map<int64_t, std::vector<int64_t>> rows;
  int64_t row = 0;
  for (const auto& [sequence, tokens] : plan)
    for (int64_t i = 0; i < tokens + static_cast<int64_t>(sequence->draft.size()); ++i)
      rows[sequence->experts_per_token].push_back(row++);
  batch.experts_per_token = rows.begin()->first;
  if (rows.size() > 1)
    for (const auto& [count, of] : rows) batch.rows_by_experts[count] = torch::tensor(of, torch::kInt64).to(device);
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
      uses_graphs_(options.cuda_graph && model_->device().is_cuda() && model_->placement().is_whole() &&
                   !model_->expert_runner()),
      cache_(model_->cache_config(),
             {options.page_size, options.num_pages, options.max_chunk, model_->device(), model_->dtype(),
              uses_graphs_ ? DecodeGraphs::padding_tokens(options.max_batch) : 0}) {}

struct ModelRunner::Pass {
  std::vector<Scheduler::Chunk> plan;
  Clock::time_point launched;
  std::vector<int64_t> rows;         // that need logits
  std::vector<Sequence*> sequences;  // all of whose tokens it computes
  std::vector<int64_t> first_rows;   // of the logits: that of a sequence's newest token; those of its draft follow
  std::vector<PromptToken> prompt_tokens;     // their rows of the logits are the last ones
  std::unique_ptr<RoutingObserver> observer;  // or none
  mixtral::Pass started;                      // of the model
  bool computed = false;                      // or failed
  torch::Tensor logits;                       // f32 [rows, vocab], once it is computed; undefined: no row needs any
  std::exception_ptr error;
  bool out_of_memory = false;

  // In a catch block. An error of a rank is not the pass's own.
  void fail() {
    computed = true;
    try {
      throw;
    } catch (const RankError&) {
      throw;
    } catch (const std::exception& exception) {
      error = std::current_exception();
      out_of_memory = is_out_of_memory(exception);
      observer.reset();
    }
  }
};

ModelRunner::~ModelRunner() = default;

// Often enough for any timeout, and for a rank that ends to be missed soon.
double ModelRunner::ping_seconds() const { return model_->placement().is_whole() ? 0 : 0.25; }

void ModelRunner::launch(const std::vector<Scheduler::Chunk>& plan) { passes_.push_back(start(plan)); }

std::vector<Step> ModelRunner::collect() {
  Pass pass = std::move(passes_.front());
  passes_.pop_front();
  const Clock::time_point begin = std::max(pass.launched, collected_);
  std::vector<Step> steps = finish(std::move(pass));
  collected_ = Clock::now();
  pass_seconds_ = std::chrono::duration<double>(collected_ - begin).count();
  return steps;
}

ModelRunner::Pass ModelRunner::start(const std::vector<Scheduler::Chunk>& plan) {
  Pass pass;
  pass.plan = plan;
  pass.launched = Clock::now();
  try {
    std::vector<RollingKVCache::Chunk> chunks;
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
      pass.first_rows.push_back(static_cast<int64_t>(pass.rows.size()));
      for (auto row = total - 1 - static_cast<int64_t>(sequence->draft.size()); row < total; ++row)
        pass.rows.push_back(row);
    }
    for (const PromptToken& token : pass.prompt_tokens) pass.rows.push_back(token.row);
    pass.observer = make_observer(plan, model_->config(), routing_counts_ != nullptr);
    start_model(pass, chunks);
  } catch (...) {
    pass.fail();
  }
  return pass;
}

void ModelRunner::start_model(Pass& pass, const std::vector<RollingKVCache::Chunk>& chunks) {
  const auto as_captured = [&](const Scheduler::Chunk& chunk) {
    return chunk.tokens == 1 && chunk.sequence->draft.empty() &&
           chunk.sequence->experts_per_token == model_->config().top_k;
  };
  if (uses_graphs_ && !pass.observer && chunks.size() <= DecodeGraphs::kMaxSequences && pass.prompt_tokens.empty() &&
      pass.rows.size() == chunks.size() && std::all_of(pass.plan.begin(), pass.plan.end(), as_captured)) {
    if (!graphs_) graphs_.emplace(*model_, cache_);
    pass.logits = graphs_->logits(chunks);
    pass.computed = true;
    return;
  }
  Batch batch = cache_.prepare(chunks);
  batch.routing = pass.observer.get();
  set_experts(batch, pass.plan, model_->device());
  pass.started = model_->start(batch, &cache_);
}

// The model finishes passes in the order in which they were started, so all older ones must be computed.
void ModelRunner::finish_model(Pass& pass) {
  if (std::exchange(pass.computed, true)) return;
  try {
    const torch::Tensor hidden = model_->finish(pass.started);
    if (!pass.rows.empty()) pass.logits = model_->logits(select_rows(hidden, pass.rows));
  } catch (...) {
    pass.fail();
  }
}

std::vector<Step> ModelRunner::finish(Pass pass) {
  finish_model(pass);
  try {
    if (pass.error) {
      roll_back(pass.plan);
      if (pass.out_of_memory && pass.plan.size() > 1) return compute_halves(pass.plan);
      std::rethrow_exception(pass.error);
    }
    if (pass.observer) add_to_traces(*pass.observer, pass.plan);
    for (const auto& [sequence, tokens] : pass.plan) sequence->computed += tokens;
    std::vector<Step> steps = pick(pass);
    if (routing_counts_) count_routing(*pass.observer, pass.plan, steps, *routing_counts_);
    return steps;
  } catch (const RankError&) {
    throw;
  } catch (...) {
    for (const auto& chunk : pass.plan) chunk.sequence->error = std::current_exception();
    return {};
  }
}

std::vector<Step> ModelRunner::compute_halves(const std::vector<Scheduler::Chunk>& plan) {
  for (Pass& behind : passes_) finish_model(behind);
  const auto middle = plan.begin() + static_cast<std::ptrdiff_t>(plan.size() / 2);
  std::vector<Step> steps = finish(start({plan.begin(), middle}));
  for (Step& step : finish(start({middle, plan.end()}))) steps.push_back(std::move(step));
  return steps;
}

// The cache forgets what a pass that failed was to write.
void ModelRunner::roll_back(const std::vector<Scheduler::Chunk>& plan) {
  for (const auto& chunk : plan) cache_.truncate(chunk.sequence->cache_id, chunk.sequence->computed);
}

std::vector<Step> ModelRunner::pick(Pass& pass) {
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
