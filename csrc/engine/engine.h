// The engine: takes requests at any time and generates for all of them together.
//
//   Engine        checks requests; submit(), cancel(), generate()
//   EngineThread  the one thread that runs forward passes
//   EngineCore    runs a pass, hands out results
//   Scheduler     which requests run, how many tokens of each, and with which pages
//   ModelRunner   the model, its cache and its CUDA graphs
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../checkpoint/load_options.h"
#include "../model/config.h"
#include "../model/defaults.h"
#include "../model/weight_type.h"
#include "../text/tokenizer.h"
#include "request.h"
#include "routing_counts.h"

namespace mixtral {

class Mixtral;
class MixtralImpl;

class Engine {
 public:
  struct Options {
    int64_t chunk_size = kChunkSize;  // prefill tokens of one sequence per forward pass
    // The same of a pass in which others decode, and of all sequences twice as many; 0: chunk_size and token_budget.
    // Less keeps the tokens of those even, more reads prompts faster.
    int64_t mixed_chunk_size = 0;
    int64_t token_budget = kTokenBudget;  // tokens of all sequences per forward pass
    int64_t max_batch = kMaxBatch;        // sequences at a time; further requests wait for one to finish
    int64_t page_size = kPageSize;
    int64_t ctx_size = 0;  // longest prompt plus new tokens; 0: the model's max_position
    // Bytes of the pool of keys and values. 0: room for max_batch sequences of ctx_size tokens, in at most half of the
    // memory that the device has left.
    int64_t kv_memory = 0;
    // Requests at a time, and tokens of their prompts, those that run included; 0: any number.
    int64_t max_queue = 0, max_queue_tokens = 0;
    bool prefix_cache = true;  // keep keys and values of full pages for requests that begin with the same tokens
    bool cuda_graph = true;    // on CUDA, decode in graphs (decode_graphs.h)
    int64_t speculate = 0;     // most tokens to guess from earlier text (speculation.h); 0: none. Changes no bit
    // Files, at most one of them: every pass goes into the first; every pass has to be that of the second, or it fails
    // (plan_trace.h).
    std::string plan_trace, plan_replay;
  };
  // The text of Callbacks::on_progress with the index of the prompt. Returning false cancels that prompt alone.
  using OnText = std::function<bool(size_t index, const std::string& text)>;
  // Called on the waiting thread, about every 50 ms. An exception cancels the requests and is rethrown.
  using WhileWaiting = std::function<void()>;

  // Throws std::invalid_argument when an option is out of range, OutOfMemory when the pool does not fit the device.
  Engine(Mixtral model, std::optional<Tokenizer> tokenizer, Options options);
  // Loads the model (checkpoint/from_pretrained.h), and the tokenizer if the folder has one. A tokenizer.json of a kind
  // that Tokenizer does not read is a LoadError.
  static Engine from_pretrained(const std::filesystem::path& folder, const LoadOptions& load = {});
  static Engine from_pretrained(const std::filesystem::path& folder, const LoadOptions& load, Options options);
  // The same with a tokenizer that was read before, or none.
  static Engine from_pretrained(const std::filesystem::path& folder, const LoadOptions& load, Options options,
                                std::optional<Tokenizer> tokenizer);
  // Cancels what still runs.
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) = delete;

  // Places among max_queue requests, before the work of making some (Request::seat): all or none. Throws QueueFull when
  // there are not as many now, std::invalid_argument when there never are.
  std::vector<Seat> reserve_seats(int64_t count);
  // Queues a request and returns its id. Results come through the callbacks, on the engine's thread. Throws
  // std::invalid_argument for an empty prompt, an id outside the vocabulary, a prompt that does not fit ctx_size with
  // max_tokens, a parameter out of range, or stop strings without a tokenizer; OutOfMemory when the pool could not hold
  // prompt and max_tokens even for this request alone; QueueFull; the RankError after which there is a failure(). The
  // forward passes use as many CPU threads as torch
  // does on the thread of the last submit().
  int64_t submit(Request request, Callbacks callbacks);
  // From now on `call` runs on the engine's thread between forward passes, once the callbacks of some requests have
  // returned, until it returns false. It must not throw. There may be several.
  void after_passes(std::function<bool()> call);
  // Ends a request with "cancelled" before the next forward pass. An id that has ended is ignored.
  void cancel(int64_t id);
  // Says which tokens the next one of a constrained request may be; a later call replaces an earlier one until the
  // token is picked, and the token after it needs a call of its own. `mask` has ceil(vocab / 32) words: bit i % 32 of
  // word i / 32 allows token i, an end-of-sequence token too. The request waits without holding up others; calls may
  // come from any thread, before the logits do: a mask that comes during the pass of the token before costs no pass.
  // No allowed token ends the request with "error". An id that has ended, or of a request that is not constrained, is
  // ignored. Throws std::invalid_argument for another number of words.
  void allow(int64_t id, std::vector<int32_t> mask) { allow({{id, std::move(mask)}}); }
  // The same for several requests, which then share their next pass.
  void allow(std::vector<std::pair<int64_t, std::vector<int32_t>>> masks);

  // Submits all requests and waits for them. Throws what submit() does, before any of them runs, also for a constrained
  // request, and what a callback throws: the requests that are left are cancelled then.
  std::vector<Generation> generate(std::vector<Request> requests, const OnText& on_text = nullptr,
                                   Timings* timings = nullptr, const WhileWaiting& while_waiting = nullptr);
  // The same for token ids, with one SamplingParams for all or one per prompt.
  std::vector<Generation> generate(const std::vector<std::vector<int64_t>>& prompts,
                                   const std::vector<SamplingParams>& params, const OnText& on_text = nullptr,
                                   Timings* timings = nullptr, const WhileWaiting& while_waiting = nullptr);

  // Writes what the prefix cache has of the tokens `ids` into a file (prompt_cache_file.h), with which another process
  // goes on to the same bits. Throws std::runtime_error when the file cannot be written; it is then as it was. Both
  // throw std::invalid_argument for a model that is split over ranks.
  void save_prompt_cache(const std::vector<int64_t>& ids, const std::filesystem::path& file);
  // Puts the tokens of a file into the prefix cache. Throws LoadError, also for a file of another model, and
  // OutOfMemory.
  void load_prompt_cache(const std::filesystem::path& file);

  // After the last request: throws std::runtime_error when plan_trace could not be written, or plan_replay has more
  // passes.
  void finish_plan_trace();

  // Why the engine takes no more requests: a process that holds a part of the model has ended or is silent. From any
  // thread.
  std::optional<std::string> failure() const;
  EngineStats stats() const;  // as of the last forward pass, or the last end of a request; from any thread
  // Throws std::logic_error when pages, requests and the prefix cache contradict each other. For tests.
  void check_integrity();

  // What the routers have decided for all requests so far; any thread may ask. None for a model without experts, and on
  // CUDA while cuda_graph is on: a graph runs unwatched.
  std::optional<RoutingCounts::Totals> routing_counts() const;

  // Cancels all requests, and ends the thread. The engine takes no more requests.
  void stop();

  MixtralImpl& model() const;
  const Config& config() const;
  WeightType weight_type() const;
  std::string device() const;  // "cpu", "cuda:0"
  const std::optional<Tokenizer>& tokenizer() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mixtral
