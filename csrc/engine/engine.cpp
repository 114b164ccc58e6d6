#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "../checkpoint/folder.h"
#include "../checkpoint/from_pretrained.h"
#include "../io/size.h"
#include "../model/memory.h"
#include "../model/transformer.h"
#include "engine_thread.h"
#include "model_runner.h"
#include "plan_trace.h"
#include "prompt_cache_file.h"
#include "request_check.h"
#include "require.h"
#include "threads.h"

namespace mixtral {
namespace {

constexpr std::chrono::milliseconds kWakeUp{50};

Engine::Options checked(Engine::Options options, const Config& config) {
  const auto positive = [](const char* name, int64_t value) {
    require(value > 0, std::string("Engine: ") + name + " must be > 0, got " + std::to_string(value));
  };
  positive("chunk_size", options.chunk_size);
  positive("token_budget", options.token_budget);
  positive("max_batch", options.max_batch);
  positive("page_size", options.page_size);
  require(options.mixed_chunk_size >= 0,
          "Engine: mixed_chunk_size must be >= 0, got " + std::to_string(options.mixed_chunk_size));
  if (options.ctx_size == 0) options.ctx_size = config.max_position;
  positive("ctx_size", options.ctx_size);
  require(options.speculate >= 0, "Engine: speculate must be >= 0, got " + std::to_string(options.speculate));
  options.chunk_size = std::min(options.chunk_size, options.token_budget);
  require(options.kv_memory >= 0, "Engine: kv_memory must be >= 0, got " + std::to_string(options.kv_memory));
  require(options.plan_trace.empty() || options.plan_replay.empty(), "Engine: plan_trace excludes plan_replay");
  require(options.max_queue >= 0, "Engine: max_queue must be >= 0, got " + std::to_string(options.max_queue));
  require(options.max_queue_tokens >= 0,
          "Engine: max_queue_tokens must be >= 0, got " + std::to_string(options.max_queue_tokens));
  return options;
}

// Of one sequence of `length` tokens.
int64_t pages_needed(const Config& config, const Engine::Options& options, int64_t length) {
  return RollingKVCache::pages_needed(config, options.page_size, std::min(options.chunk_size, length), length);
}

int64_t pages_of_pool(const MixtralImpl& model, const Engine::Options& options) {
  const int64_t page_bytes = RollingKVCache::page_bytes(model.cache_config(), options.page_size, model.dtype());
  if (options.kv_memory > 0) {
    require(options.kv_memory >= page_bytes, "Engine: kv_memory must hold a page of " + std::to_string(page_bytes) +
                                                 " bytes, got " + std::to_string(options.kv_memory));
    return std::min<int64_t>(options.kv_memory / page_bytes, INT32_MAX);
  }
  const double wanted = static_cast<double>(options.max_batch) *
                        static_cast<double>(pages_needed(model.config(), options, options.ctx_size));
  // The ranks of a model on the CPU share the memory of this host, and each holds its part of every page.
  const int64_t taken = model.device().is_cpu()
                            ? RollingKVCache::page_bytes(model.config(), options.page_size, model.dtype())
                            : page_bytes;
  const double affordable =
      static_cast<double>(available_memory(model.device().str())) / 2 / static_cast<double>(taken);
  return static_cast<int64_t>(std::clamp<double>(std::min(wanted, affordable), 1, INT32_MAX));
}

std::shared_ptr<RoutingCounts> make_counts(const MixtralImpl& model, const Engine::Options& options) {
  const Config& config = model.config();
  if (config.num_experts == 0 || (options.cuda_graph && model.device().is_cuda())) return nullptr;
  return std::make_shared<RoutingCounts>(config.num_layers, config.num_experts);
}

std::unique_ptr<PlanTrace> make_plan_trace(const Engine::Options& options) {
  if (!options.plan_trace.empty()) return std::make_unique<PlanTrace>(options.plan_trace, PlanTrace::Mode::kWrite);
  if (!options.plan_replay.empty()) return std::make_unique<PlanTrace>(options.plan_replay, PlanTrace::Mode::kReplay);
  return nullptr;
}

Scheduler::Options options_of_scheduler(const Engine::Options& options, int64_t depth) {
  Scheduler::Options result{options.chunk_size, options.token_budget, options.max_batch, options.prefix_cache};
  result.mixed_chunk_size = options.mixed_chunk_size;
  result.depth = depth;
  return result;
}

std::unique_ptr<EngineCore> make_core(const Mixtral& model, const Engine::Options& options, int64_t num_pages,
                                      std::shared_ptr<RoutingCounts> counts) {
  auto runner = std::make_unique<ModelRunner>(
      model, ModelRunner::Options{options.page_size, options.chunk_size, options.max_batch, num_pages,
                                  options.cuda_graph, std::move(counts)});
  return std::make_unique<EngineCore>(std::move(runner), options_of_scheduler(options, model->placement().stages),
                                      options.speculate, make_plan_trace(options));
}

std::optional<Tokenizer> tokenizer_in(const std::filesystem::path& folder) {
  return Tokenizer::in_folder(folder) ? std::make_optional<Tokenizer>(folder) : std::nullopt;
}

// One generate(): the results that have come, and who waits for them.
struct Call {
  Call(size_t count, Engine::OnText on_text) : on_text(std::move(on_text)), generations(count), left(count) {}

  void end(size_t index, Outcome outcome) {
    const std::lock_guard lock(mutex);
    generations[index] = std::move(outcome.generation);
    if (!error) error = outcome.error;
    --left;
    changed.notify_one();
  }

  const Engine::OnText on_text;
  const std::shared_ptr<Timings> timings = std::make_shared<Timings>();
  std::mutex mutex;  // of everything below
  std::condition_variable changed;
  std::vector<Generation> generations;
  size_t left;
  std::exception_ptr error;  // the first
};

}  // namespace

struct Engine::Impl {
  Impl(Mixtral model, std::optional<Tokenizer> tokenizer, Options options)
      : model(std::move(model)),
        tokenizer(std::move(tokenizer)),
        options(checked(options, this->model->config())),
        num_pages(pages_of_pool(*this->model, this->options)),
        routing_counts(make_counts(*this->model, this->options)),
        thread(make_core(this->model, this->options, num_pages, routing_counts)) {
    if (!this->model->placement().is_whole()) fingerprint();  // other ranks answer while nothing is computed
  }

  std::unique_ptr<Sequence> make_sequence(Request request, Callbacks callbacks);
  void check_fits(int64_t length) const;
  const std::string& fingerprint();
  void wait(Call& call, const std::vector<int64_t>& ids, const WhileWaiting& while_waiting);

  Mixtral model;
  const std::optional<Tokenizer> tokenizer;
  const Options options;
  const int64_t num_pages;
  const std::shared_ptr<RoutingCounts> routing_counts;  // or none
  std::once_flag fingerprinted;
  std::string fingerprint_;
  std::atomic<int64_t> next_id{0};
  const std::shared_ptr<Seats> seats = std::make_shared<Seats>(options.max_queue, options.max_queue_tokens);
  // The calls of after_passes(), for the thread alone.
  const std::shared_ptr<std::vector<std::function<bool()>>> after_passes =
      std::make_shared<std::vector<std::function<bool()>>>();
  EngineThread thread;
};

// Of a request for `length` tokens.
void Engine::Impl::check_fits(int64_t length) const {
  const int64_t needed = pages_needed(model->config(), options, length);
  if (needed <= num_pages) return;
  const int64_t page_bytes = RollingKVCache::page_bytes(model->cache_config(), options.page_size, model->dtype());
  throw OutOfMemory("the key/value cache: prompt and max_tokens of " + std::to_string(length) + " tokens need " +
                    std::to_string(needed) + " pages (" + bytes_text(static_cast<double>(needed * page_bytes)) +
                    "), and the pool has " + std::to_string(num_pages) + " (" +
                    bytes_text(static_cast<double>(num_pages * page_bytes)) + "): lower max_tokens or raise kv_memory");
}

// Of the model, for replays; computed once, since it reads some of every parameter.
const std::string& Engine::Impl::fingerprint() {
  std::call_once(fingerprinted, [this] { fingerprint_ = trace_fingerprint(*model); });
  return fingerprint_;
}

std::unique_ptr<Sequence> Engine::Impl::make_sequence(Request request, Callbacks callbacks) {
  if (!request.seat) request.seat = seats->reserve(1)[0];
  check_request(request, *model, options.ctx_size, tokenizer.has_value());
  const auto prompt_length = static_cast<int64_t>(request.prompt_token_ids.size());
  check_fits(prompt_length + request.params.max_tokens);
  request.seat->add_prompt(prompt_length);
  if (request.replay) {
    check_same_model(*request.replay, model->config(), fingerprint());
    request.experts_per_token = request.replay->routing.top_k;
  }
  if (request.experts_per_token == 0) request.experts_per_token = model->config().top_k;
  std::shared_ptr<Trace> trace;
  if (request.trace) trace = std::make_shared<Trace>(empty_trace(model->config(), request.experts_per_token));
  auto sequence = std::make_unique<Sequence>(next_id++, std::move(request), std::move(callbacks), tokenizer,
                                             model->config().eos_token_ids);
  sequence->generation.trace = std::move(trace);
  sequence->num_threads = num_threads();
  return sequence;
}

// Until all requests of the call have ended. Rethrows the first error.
void Engine::Impl::wait(Call& call, const std::vector<int64_t>& ids, const WhileWaiting& while_waiting) {
  std::exception_ptr interruption;
  bool cancelled = false;
  std::unique_lock lock(call.mutex);
  while (call.left > 0) {
    const auto news = [&] { return call.left == 0 || (call.error && !cancelled); };
    const bool woken = call.changed.wait_for(lock, kWakeUp, news);
    if (cancelled || call.left == 0) continue;
    lock.unlock();
    try {
      if (!woken && while_waiting) while_waiting();
    } catch (...) {
      interruption = std::current_exception();
    }
    if (woken || interruption) {
      thread.cancel(ids);
      cancelled = true;
    }
    lock.lock();
  }
  if (interruption) std::rethrow_exception(interruption);
  if (call.error) std::rethrow_exception(call.error);
}

Engine::Engine(Mixtral model, std::optional<Tokenizer> tokenizer, Options options)
    : impl_(std::make_unique<Impl>(std::move(model), std::move(tokenizer), options)) {}

Engine Engine::from_pretrained(const std::filesystem::path& folder, const LoadOptions& load) {
  return from_pretrained(folder, load, Options());
}

Engine Engine::from_pretrained(const std::filesystem::path& folder, const LoadOptions& load, Options options) {
  return from_pretrained(folder, load, options, tokenizer_in(find_model(folder)));
}

Engine Engine::from_pretrained(const std::filesystem::path& folder, const LoadOptions& load, Options options,
                               std::optional<Tokenizer> tokenizer) {
  return Engine(mixtral::from_pretrained(folder, load), std::move(tokenizer), options);
}

Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;

int64_t Engine::submit(Request request, Callbacks callbacks) {
  std::vector<std::unique_ptr<Sequence>> sequences;
  sequences.push_back(impl_->make_sequence(std::move(request), std::move(callbacks)));
  const int64_t id = sequences[0]->id;
  impl_->thread.submit(std::move(sequences));
  return id;
}

void Engine::after_passes(std::function<bool()> call) {
  impl_->thread.run([&call, calls = impl_->after_passes](EngineCore& core) {
    calls->push_back(std::move(call));
    core.after_pass = [calls] {
      const auto ends = [](const auto& each) { return !each(); };
      calls->erase(std::remove_if(calls->begin(), calls->end(), ends), calls->end());
    };
  });
}

void Engine::cancel(int64_t id) { impl_->thread.cancel({id}); }

void Engine::allow(std::vector<std::pair<int64_t, std::vector<int32_t>>> masks) {
  const auto words = static_cast<size_t>((config().vocab_size + 31) / 32);
  for (const auto& id_and_mask : masks)
    require(id_and_mask.second.size() == words, "allow: mask must have " + std::to_string(words) +
                                                    " words of 32 tokens, got " +
                                                    std::to_string(id_and_mask.second.size()));
  impl_->thread.allow(std::move(masks));
}

std::vector<Generation> Engine::generate(std::vector<Request> requests, const OnText& on_text, Timings* timings,
                                         const WhileWaiting& while_waiting) {
  if (impl_->thread.is_current()) throw std::logic_error("Engine: a callback must not wait for generate()");
  if (requests.empty()) return {};
  const auto call = std::make_shared<Call>(requests.size(), on_text);
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<int64_t> ids;
  for (size_t i = 0; i < requests.size(); ++i) {
    require(!requests[i].constrained, "generate: a constrained request must come through submit(), which tells its id");
    Callbacks callbacks;
    if (on_text)
      callbacks.on_progress = [call, i](const GenerationProgress& pass) { return call->on_text(i, pass.text); };
    callbacks.on_end = [call, i](Outcome outcome) { call->end(i, std::move(outcome)); };
    sequences.push_back(impl_->make_sequence(std::move(requests[i]), std::move(callbacks)));
    sequences.back()->timings = call->timings;
    ids.push_back(sequences.back()->id);
  }
  impl_->thread.submit(std::move(sequences));
  impl_->wait(*call, ids, while_waiting);
  if (timings) *timings = *call->timings;
  return std::move(call->generations);
}

std::vector<Generation> Engine::generate(const std::vector<std::vector<int64_t>>& prompts,
                                         const std::vector<SamplingParams>& params, const OnText& on_text,
                                         Timings* timings, const WhileWaiting& while_waiting) {
  require(params.size() == 1 || params.size() == prompts.size(),
          "params must be one for all prompts or one per prompt (" + std::to_string(prompts.size()) + "), got " +
              std::to_string(params.size()));
  std::vector<Request> requests;
  for (size_t i = 0; i < prompts.size(); ++i)
    requests.push_back({prompts[i], params.size() == 1 ? params[0] : params[i]});
  return generate(std::move(requests), on_text, timings, while_waiting);
}

void Engine::save_prompt_cache(const std::vector<int64_t>& ids, const std::filesystem::path& file) {
  impl_->model->require_whole("prompt cache");
  PromptCache saved;
  impl_->thread.run([&](EngineCore& core) { saved = core.save_prompt_cache(ids, config().top_k); });
  write_prompt_cache(saved, *impl_->model, file);
}

void Engine::load_prompt_cache(const std::filesystem::path& file) {
  impl_->model->require_whole("prompt cache");
  const PromptCache saved = read_prompt_cache(*impl_->model, impl_->options.page_size, file);
  impl_->thread.run([&](EngineCore& core) { core.load_prompt_cache(saved, config().top_k); });
}

void Engine::finish_plan_trace() {
  impl_->thread.run([](EngineCore& core) {
    if (core.plan_trace()) core.plan_trace()->finish();
  });
}

std::optional<std::string> Engine::failure() const {
  const std::exception_ptr error = impl_->thread.failure();
  if (!error) return std::nullopt;
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& exception) {
    return exception.what();
  }
}

std::vector<Seat> Engine::reserve_seats(int64_t count) { return impl_->seats->reserve(count); }
EngineStats Engine::stats() const {
  EngineStats stats = impl_->thread.stats();
  stats.seats_taken = impl_->seats->taken();
  return stats;
}
void Engine::check_integrity() {
  impl_->thread.run([](EngineCore& core) { core.check_integrity(); });
}

std::optional<RoutingCounts::Totals> Engine::routing_counts() const {
  if (!impl_->routing_counts) return std::nullopt;
  return impl_->routing_counts->totals();
}

void Engine::stop() { impl_->thread.stop(); }

MixtralImpl& Engine::model() const { return *impl_->model; }
const Config& Engine::config() const { return impl_->model->config(); }
WeightType Engine::weight_type() const { return impl_->model->weight_type(); }
std::string Engine::device() const { return impl_->model->device().str(); }
const std::optional<Tokenizer>& Engine::tokenizer() const { return impl_->tokenizer; }

}  // namespace mixtral
