#include "engine.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "decode_graphs.h"
#include "sample_batch.h"

namespace mixtral {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

struct Request {
  Request(size_t index, const std::vector<int64_t>& prompt, const SamplingParams& params,
          const std::optional<Tokenizer>& tokenizer)
      : index(index), params(params), sampler(params, prompt), stop(params.stop), ids(prompt) {
    if (tokenizer) decoder.emplace(*tokenizer, /*continues_text=*/true);
    result.prompt_token_ids = prompt;
  }
  bool finished() const { return !result.finish_reason.empty(); }
  bool in_prefill() const { return computed < result.prompt_token_ids.size(); }

  size_t index;
  SamplingParams params;
  Sampler sampler;
  StopMatcher stop;
  std::optional<StreamingDecoder> decoder;
  std::vector<int64_t> ids;  // prompt and new tokens
  size_t computed = 0;       // of them, those whose keys and values are in the cache
  int64_t sequence = -1;     // in the cache, while running
  Generation result;
};

int64_t longest_prompt(const std::vector<std::unique_ptr<Request>>& requests) {
  size_t longest = 1;
  for (const auto& request : requests) longest = std::max(longest, request->ids.size());
  return static_cast<int64_t>(longest);
}

bool uses_graphs(const MixtralImpl& model, const Engine::Options& options) {
  return options.cuda_graph && model.device().is_cuda();
}

// Enough pages for the max_batch largest requests, so that whichever are running, none ever waits for a page.
RollingKVCache make_cache(const MixtralImpl& model, const Engine::Options& options, int64_t chunk_size,
                          const std::vector<std::unique_ptr<Request>>& requests) {
  const Config& config = model.config();
  std::vector<int64_t> needs;
  for (const auto& request : requests) {
    const int64_t length = static_cast<int64_t>(request->ids.size()) + request->params.max_tokens;
    needs.push_back(RollingKVCache::pages_needed(config, options.page_size, chunk_size, length));
  }
  std::sort(needs.begin(), needs.end(), std::greater<>());
  needs.resize(std::min(needs.size(), static_cast<size_t>(options.max_batch)));
  const int64_t num_pages = std::accumulate(needs.begin(), needs.end(), int64_t{0});
  const int64_t padding =
      uses_graphs(model, options) ? DecodeGraphs::padding_tokens(static_cast<int64_t>(needs.size())) : 0;
  return RollingKVCache(config, {options.page_size, num_pages, chunk_size, model.device(), model.dtype(), padding});
}

// One call of Engine::generate.
class Run {
 public:
  Run(MixtralImpl& model, const std::optional<Tokenizer>& tokenizer, const Engine::Options& options,
      const Engine::OnText& on_text, std::vector<std::unique_ptr<Request>> requests)
      : model_(model),
        tokenizer_(tokenizer),
        options_(options),
        on_text_(on_text),
        requests_(std::move(requests)),
        chunk_size_(std::min({options.chunk_size, options.token_budget, longest_prompt(requests_)})),
        cache_(make_cache(model, options, chunk_size_, requests_)) {
    if (uses_graphs(model, options)) graphs_.emplace(model_, cache_);
  }

  std::vector<Generation> run();
  const Timings& timings() const { return timings_; }

 private:
  void admit();
  void step();
  torch::Tensor forward(const std::vector<RollingKVCache::Chunk>& chunks, const std::vector<int64_t>& rows);
  void sample(const std::vector<Request*>& sampled, torch::Tensor logits);
  void accept(Request& request, int64_t id, const torch::Tensor& logits);
  void finish(Request& request, const std::string& reason);
  void show(Request& request, const std::string& piece);

  MixtralImpl& model_;
  const std::optional<Tokenizer>& tokenizer_;
  const Engine::Options& options_;
  const Engine::OnText& on_text_;
  std::vector<std::unique_ptr<Request>> requests_;
  int64_t chunk_size_;
  RollingKVCache cache_;
  std::optional<DecodeGraphs> graphs_;
  std::vector<Request*> running_;  // in the order of the prompts
  size_t admitted_ = 0;
  bool cancelled_ = false;
  Timings timings_;
};

void Run::admit() {
  while (admitted_ < requests_.size() && running_.size() < static_cast<size_t>(options_.max_batch)) {
    running_.push_back(requests_[admitted_++].get());
    running_.back()->sequence = cache_.add_sequence();
  }
}

// The last hidden rows `rows` of the batch become logits: f32 [rows, vocab].
torch::Tensor Run::forward(const std::vector<RollingKVCache::Chunk>& chunks, const std::vector<int64_t>& rows) {
  const auto one_token = [](const RollingKVCache::Chunk& chunk) { return chunk.input_ids.size() == 1; };
  if (graphs_ && chunks.size() <= DecodeGraphs::kMaxSequences && rows.size() == chunks.size() &&
      std::all_of(chunks.begin(), chunks.end(), one_token))
    return graphs_->logits(chunks);
  auto hidden = model_.hidden_states(cache_.prepare(chunks), &cache_);
  if (rows.empty()) return {};
  if (static_cast<int64_t>(rows.size()) < hidden.size(0))
    hidden = hidden.index_select(0, torch::tensor(rows, torch::kInt64).to(hidden.device()));
  return model_.logits(hidden);
}

// One forward pass, in which every running sequence computes its next tokens: more of its prompt, or its newest token.
void Run::step() {
  std::vector<RollingKVCache::Chunk> chunks;
  std::vector<int64_t> rows;      // of the tokens that are the newest of their sequence: only they need logits
  std::vector<Request*> sampled;  // their requests
  int64_t total = 0;
  const size_t count = running_.size();
  for (size_t i = 0; i < count && total < options_.token_budget; ++i) {
    Request& request = *running_[i];
    const int64_t left = static_cast<int64_t>(request.ids.size() - request.computed);
    const int64_t tokens = std::min({left, chunk_size_, options_.token_budget - total});
    const auto begin = request.ids.begin() + static_cast<std::ptrdiff_t>(request.computed);
    chunks.push_back({request.sequence, {begin, begin + tokens}});
    request.computed += static_cast<size_t>(tokens);
    total += tokens;
    if (tokens == left) {
      rows.push_back(total - 1);
      sampled.push_back(&request);
    }
  }
  const auto logits = forward(chunks, rows);
  timings_.peak_pages = std::max(timings_.peak_pages, cache_.pages_in_use());
  for (size_t i = 0; i < chunks.size() && !cancelled_; ++i)
    if (running_[i]->in_prefill()) show(*running_[i], "");
  if (!sampled.empty() && !cancelled_) sample(sampled, logits);

  const auto leaves = [&](Request* request) {
    if (request->finished()) cache_.remove_sequence(request->sequence);
    return request->finished();
  };
  running_.erase(std::remove_if(running_.begin(), running_.end(), leaves), running_.end());
}

// logits f32 [rows, vocab]: one row for each request.
void Run::sample(const std::vector<Request*>& sampled, torch::Tensor logits) {
  const auto wants_logprobs = [](const Request* request) { return request->params.logprobs > 0; };
  std::vector<int64_t> ids(sampled.size(), -1);
  if (logits.is_cpu() || std::any_of(sampled.begin(), sampled.end(), wants_logprobs)) {
    logits = logits.to(torch::kCPU);
  } else {
    std::vector<Sampler*> samplers;
    for (Request* request : sampled) samplers.push_back(&request->sampler);
    ids = sample_batch(logits, samplers);
  }
  for (size_t i = 0; i < sampled.size() && !cancelled_; ++i)
    accept(*sampled[i], ids[i], logits[static_cast<int64_t>(i)]);
}

// The next token, or -1 where it has yet to be picked from the logits [vocab].
void Run::accept(Request& request, int64_t id, const torch::Tensor& logits) {
  const Config& config = model_.config();
  Generation& result = request.result;
  try {
    if (id < 0) id = request.sampler.next(logits.to(torch::kCPU).data_ptr<float>(), config.vocab_size);
  } catch (const std::runtime_error& error) {  // NaN: the neighbours go on
    result.error = error.what();
    return finish(request, "error");
  }
  const auto& eos = config.eos_token_ids;
  if (!request.params.ignore_eos && std::find(eos.begin(), eos.end(), id) != eos.end()) return finish(request, "stop");

  request.ids.push_back(id);
  result.token_ids.push_back(id);
  if (request.params.logprobs > 0)
    result.logprobs.push_back(token_logprob(logits.data_ptr<float>(), config.vocab_size, id, request.params.logprobs));
  // The model's vocabulary may be larger than the tokenizer's; such ids have no text.
  const bool has_text = request.decoder && id < tokenizer_->vocab_size();
  show(request, has_text ? request.stop.push(request.decoder->push(id)) : "");
  if (request.stop.stopped()) return finish(request, "stop");
  if (static_cast<int64_t>(result.token_ids.size()) == request.params.max_tokens) finish(request, "length");
}

void Run::finish(Request& request, const std::string& reason) {
  request.result.finish_reason = reason;
  if (!request.decoder) return;
  std::string rest = request.stop.push(request.decoder->flush());
  if (request.stop.stopped()) request.result.finish_reason = "stop";
  rest += request.stop.flush();
  if (!rest.empty()) show(request, rest);
}

void Run::show(Request& request, const std::string& piece) {
  request.result.text += piece;
  if (on_text_ && !on_text_(request.index, piece)) cancelled_ = true;
}

std::vector<Generation> Run::run() {
  for (admit(); !running_.empty() && !cancelled_; admit()) {
    const bool prefill = std::any_of(running_.begin(), running_.end(), [](Request* r) { return r->in_prefill(); });
    const auto start = std::chrono::steady_clock::now();
    step();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    (prefill ? timings_.prefill_seconds : timings_.decode_seconds) += seconds.count();
  }
  std::vector<Generation> results;
  for (const auto& request : requests_) {
    if (!request->finished()) request->result.finish_reason = "cancelled";
    timings_.prompt_tokens += static_cast<int64_t>(request->result.prompt_token_ids.size());
    timings_.new_tokens += static_cast<int64_t>(request->result.token_ids.size());
    results.push_back(std::move(request->result));
  }
  return results;
}

}  // namespace

Engine::Engine(Mixtral model, std::optional<Tokenizer> tokenizer, Options options)
    : model_(std::move(model)), tokenizer_(std::move(tokenizer)), options_(options) {
  const auto positive = [](const char* name, int64_t value) {
    require(value > 0, std::string("Engine: ") + name + " must be > 0, got " + std::to_string(value));
  };
  positive("chunk_size", options_.chunk_size);
  positive("token_budget", options_.token_budget);
  positive("max_batch", options_.max_batch);
  positive("page_size", options_.page_size);
  if (options_.ctx_size == 0) options_.ctx_size = model_->config().max_position;
  positive("ctx_size", options_.ctx_size);
}

void Engine::check_request(const std::vector<int64_t>& prompt, const SamplingParams& params) const {
  params.validate();
  require(!prompt.empty(), "prompt must not be empty");
  model_->check_ids(prompt.data(), static_cast<int64_t>(prompt.size()));
  const int64_t length = static_cast<int64_t>(prompt.size());
  require(length <= options_.ctx_size && params.max_tokens <= options_.ctx_size - length,
          "prompt must fit the context of " + std::to_string(options_.ctx_size) + " tokens with max_tokens, got " +
              std::to_string(length) + " prompt tokens and max_tokens " + std::to_string(params.max_tokens));
  require(params.stop.empty() || tokenizer_,
          "stop must be empty without a tokenizer, got " + std::to_string(params.stop.size()) + " strings");
}

std::vector<Generation> Engine::generate(const std::vector<std::vector<int64_t>>& prompts,
                                         const std::vector<SamplingParams>& params, const OnText& on_text,
                                         Timings* timings) {
  require(params.size() == 1 || params.size() == prompts.size(),
          "params must be one for all prompts or one per prompt (" + std::to_string(prompts.size()) + "), got " +
              std::to_string(params.size()));
  if (prompts.empty()) return {};
  std::vector<std::unique_ptr<Request>> requests;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const SamplingParams& own = params.size() == 1 ? params[0] : params[i];
    check_request(prompts[i], own);
    requests.push_back(std::make_unique<Request>(i, prompts[i], own, tokenizer_));
  }
  Run run(*model_, tokenizer_, options_, on_text, std::move(requests));
  auto results = run.run();
  if (timings) *timings = run.timings();
  return results;
}

}  // namespace mixtral
