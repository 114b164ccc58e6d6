#include "../engine/engine.h"

#include <torch/csrc/utils/pybind.h>

#include "../engine/continuations.h"
#include "../engine/score.h"
#include "../model/transformer.h"
#include "bindings.h"

namespace mixtral {
namespace {

// The memory of a member of the trace's routing, [tokens,L,K], which keeps the trace alive.
template <typename T>
std::optional<torch::Tensor> routed(const Generation& generation, std::vector<T> Routing::*values,
                                    torch::ScalarType dtype) {
  const std::shared_ptr<Trace>& trace = generation.trace;
  if (!trace) return std::nullopt;
  Routing& routing = trace->routing;
  return torch::from_blob((routing.*values).data(), {routing.tokens(), routing.layers, routing.top_k},
                          [trace](void*) {}, dtype);
}

std::optional<torch::Tensor> routed_experts(const Generation& generation) {
  return routed(generation, &Routing::topk_ids, torch::kUInt8);
}

std::optional<torch::Tensor> routed_weights(const Generation& generation) {
  return routed(generation, &Routing::topk_weights, torch::kFloat16);
}

void bind_results(py::module_& m) {
  py::class_<SamplingParams>(m, "SamplingParams")
      .def(py::init(&from_kwargs<SamplingParams>))
      .def_readwrite("max_tokens", &SamplingParams::max_tokens)
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("logit_bias", &SamplingParams::logit_bias)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("stop", &SamplingParams::stop)
      .def_readwrite("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_readwrite("min_tokens", &SamplingParams::min_tokens)
      .def_readwrite("logprobs", &SamplingParams::logprobs)
      .def_readwrite("prompt_logprobs", &SamplingParams::prompt_logprobs)
      .def_readwrite("ignore_eos", &SamplingParams::ignore_eos);
  py::class_<TokenLogprob>(m, "TokenLogprob",
                           "Natural-log probability of a token, and of the most likely ones at its place.")
      .def_readonly("token_id", &TokenLogprob::token_id)
      .def_readonly("logprob", &TokenLogprob::logprob)
      .def_readonly("top", &TokenLogprob::top, "[(token id, logprob)], falling.");
  py::class_<Generation>(m, "Generation", "What came out for one prompt.")
      .def_readonly("prompt_token_ids", &Generation::prompt_token_ids)
      .def_readonly("token_ids", &Generation::token_ids, "Without the end-of-sequence token.")
      .def_readonly("text", &Generation::text)
      .def_readonly("finish_reason", &Generation::finish_reason, "\"stop\", \"length\", \"cancelled\" or \"error\".")
      .def_readonly("error", &Generation::error, "Why, when finish_reason is \"error\".")
      .def_readonly("logprobs", &Generation::logprobs, "[TokenLogprob], one per token when asked for.")
      .def_readonly("prompt_logprobs", &Generation::prompt_logprobs,
                    "[TokenLogprob], one per token of the prompt when asked for; None for the first.")
      .def_property_readonly(
          "routed_experts", &routed_experts,
          "uint8 [tokens, layers, experts per token], of every token that the model read: the prompt "
          "and all new ones but the newest. None unless asked for.")
      .def_property_readonly("routed_weights", &routed_weights, "float16 of the same shape: the router's weights.")
      .def("__repr__", [](const py::object& self) {
        return py::str("Generation(text={!r}, finish_reason={!r}, {} tokens)")
            .format(self.attr("text"), self.attr("finish_reason"), py::len(self.attr("token_ids")));
      });
  py::class_<Timings>(m, "Timings", "Of one generate call: seconds, tokens, and pages of the key/value cache.")
      .def_readonly("prefill_seconds", &Timings::prefill_seconds)
      .def_readonly("decode_seconds", &Timings::decode_seconds)
      .def_readonly("prompt_tokens", &Timings::prompt_tokens)
      .def_readonly("cached_tokens", &Timings::cached_tokens, "Prompt tokens that the prefix cache had.")
      .def_readonly("new_tokens", &Timings::new_tokens)
      .def_readonly("drafted_tokens", &Timings::drafted_tokens, "Guessed by speculation.")
      .def_readonly("accepted_tokens", &Timings::accepted_tokens, "Of those, the ones that held.")
      .def_readonly("peak_pages", &Timings::peak_pages);
  py::class_<EngineStats>(m, "EngineStats", "The engine at one moment, and what it has done since it began.")
      .def_readonly("running", &EngineStats::running, "Requests.")
      .def_readonly("waiting", &EngineStats::waiting, "Requests.")
      .def_readonly("pages", &EngineStats::pages, "Of the key/value cache.")
      .def_readonly("pages_in_use", &EngineStats::pages_in_use, "By requests that run.")
      .def_readonly("pages_cached", &EngineStats::pages_cached, "In use by no request, but in the prefix cache.")
      .def_readonly("prompt_tokens", &EngineStats::prompt_tokens, "Of requests that were admitted.")
      .def_readonly("generated_tokens", &EngineStats::generated_tokens)
      .def_readonly("prefix_queries", &EngineStats::prefix_queries, "Prompt tokens looked for in the prefix cache.")
      .def_readonly("prefix_hits", &EngineStats::prefix_hits, "Of these, the tokens found.")
      .def_readonly("preemptions", &EngineStats::preemptions)
      .def_readonly("computed_tokens", &EngineStats::computed_tokens, "By forward passes.")
      .def_readonly("seats_taken", &EngineStats::seats_taken, "By requests, and reserved for some that are to come.");
  py::class_<Score>(m, "Score", "How well a model predicted a text.")
      .def_readonly("tokens", &Score::tokens, "Of the text; all are predicted.")
      .def_readonly("bytes", &Score::bytes, "Of the text in UTF-8.")
      .def_property_readonly("nats_per_token", &Score::nats_per_token, "Negative log-likelihood, natural logarithm.")
      .def_property_readonly("perplexity", &Score::perplexity, "Per token.")
      .def_property_readonly("bits_per_byte", &Score::bits_per_byte, "Comparable between tokenizers.")
      .def("__repr__", [](const py::object& self) {
        return py::str("Score(perplexity={:.4f}, bits_per_byte={:.4f}, {} tokens)")
            .format(self.attr("perplexity"), self.attr("bits_per_byte"), self.attr("tokens"));
      });
}

// Raises KeyboardInterrupt after Ctrl-C. Python handles signals on its main thread alone.
void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Held by the engine's thread, which has no GIL when it lets go.
using SharedObject = std::shared_ptr<py::object>;

SharedObject share(py::object object) {
  return SharedObject(new py::object(std::move(object)), [](py::object* shared) {
    const py::gil_scoped_acquire gil;
    delete shared;
  });
}

// What a callback on text returns: None, as of a function that only prints, goes on too.
bool goes_on(const py::object& returned) { return returned.is_none() || returned.cast<bool>(); }

// -> ([Generation], Timings), n for each prompt. A Python error in `on_text` travels through the engine to the caller.
std::pair<std::vector<Generation>, Timings> generate(Engine& engine, const std::vector<std::vector<int64_t>>& prompts,
                                                     const SamplingParams& params, int64_t experts_per_token,
                                                     bool trace, const py::object& on_text, int64_t n) {
  std::vector<Request> requests;
  for (const auto& prompt : prompts) {
    for (int64_t i = 0; i < n; ++i) {
      requests.push_back({prompt, params, experts_per_token, trace});
      if (params.seed) requests.back().params.seed = sample_seed(*params.seed, i);
    }
  }
  Engine::OnText call;
  if (!on_text.is_none()) {
    call = [callback = share(on_text)](size_t index, const std::string& text) {
      const py::gil_scoped_acquire gil;
      return goes_on((*callback)(index, text));
    };
  }
  const py::gil_scoped_release no_gil;
  Timings timings;
  auto generations = engine.generate(std::move(requests), call, &timings, check_signals);
  return {std::move(generations), timings};
}

int64_t submit(Engine& engine, const std::vector<int64_t>& prompt, const SamplingParams& params,
               int64_t experts_per_token, const py::object& on_text, const py::object& on_end, bool constrained) {
  Callbacks callbacks;
  callbacks.on_progress = [callback = share(on_text)](const GenerationProgress& progress) {
    const py::gil_scoped_acquire gil;
    return goes_on((*callback)(progress.text));
  };
  callbacks.on_end = [callback = share(on_end)](Outcome outcome) {
    const py::gil_scoped_acquire gil;
    try {
      (*callback)(std::move(outcome));
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("mixtral: on_end");
    }
  };
  const py::gil_scoped_release no_gil;
  Request request = {prompt, params, experts_per_token};
  request.constrained = constrained;
  return engine.submit(std::move(request), std::move(callbacks));
}

// masks: the bytes of int32 [ceil(vocab / 32)] of each id.
void allow(Engine& engine, const std::vector<int64_t>& ids, const std::vector<std::string_view>& masks) {
  constexpr size_t kWord = sizeof(int32_t);
  if (masks.size() != ids.size()) throw std::invalid_argument("allow: masks must be as many as ids");
  std::vector<std::pair<int64_t, std::vector<int32_t>>> by_id;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (masks[i].size() % kWord != 0) throw std::invalid_argument("allow: a mask must be of whole words of 32 tokens");
    std::vector<int32_t> words(masks[i].size() / kWord);
    std::memcpy(words.data(), masks[i].data(), masks[i].size());
    by_id.emplace_back(ids[i], std::move(words));
  }
  engine.allow(std::move(by_id));
}

// (tokens, first, chosen): the last two [L][E]. None where nothing is counted.
py::object routing_counts(const Engine& engine) {
  const auto counts = engine.routing_counts();
  if (!counts) return py::none();
  const auto rows = [&counts](const std::vector<int64_t>& values) {
    std::vector<std::vector<int64_t>> layers;
    for (auto row = values.begin(); row != values.end(); row += counts->experts)
      layers.emplace_back(row, row + counts->experts);
    return layers;
  };
  return py::make_tuple(counts->tokens, rows(counts->first), rows(counts->chosen));
}

Generation result(const Outcome& outcome) {
  if (outcome.error) std::rethrow_exception(outcome.error);
  return outcome.generation;
}

// The engine waits for its thread, which may wait for the GIL.
struct DeleteWithoutGil {
  void operator()(Engine* engine) const {
    const py::gil_scoped_release no_gil;
    delete engine;
  }
};

Score score_text(MixtralImpl& model, const Tokenizer& tokenizer, const std::string& text, int64_t ctx_size,
                 int64_t chunk_size) {
  return score(model, tokenizer, text, {ctx_size, chunk_size, [](int64_t, int64_t) { check_signals(); }});
}

// contexts, continuations: ids of each request -> [(logprob, is_greedy)].
std::vector<std::pair<double, bool>> score_pairs(MixtralImpl& model, const std::vector<std::vector<int64_t>>& contexts,
                                                 const std::vector<std::vector<int64_t>>& continuations,
                                                 int64_t chunk_size, const py::object& progress) {
  std::vector<Continuation> requests;
  for (size_t i = 0; i < contexts.size(); ++i) {
    Continuation& request = requests.emplace_back();
    request.ids = contexts[i];
    request.begin = static_cast<int64_t>(contexts[i].size());
    request.ids.insert(request.ids.end(), continuations.at(i).begin(), continuations.at(i).end());
  }
  const auto report = [&progress](int64_t done, int64_t total) {
    check_signals();
    const py::gil_scoped_acquire gil;
    if (!progress.is_none()) progress(done, total);
  };
  const py::gil_scoped_release no_gil;
  std::vector<std::pair<double, bool>> results;
  for (const ContinuationScore& score : score_continuations(model, requests, chunk_size, report))
    results.emplace_back(score.logprob, score.is_greedy);
  return results;
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_results(m);
  py::class_<Engine::Options>(m, "EngineOptions")
      .def(py::init(&from_kwargs<Engine::Options>))
      .def_readwrite("chunk_size", &Engine::Options::chunk_size)
      .def_readwrite("mixed_chunk_size", &Engine::Options::mixed_chunk_size)
      .def_readwrite("token_budget", &Engine::Options::token_budget)
      .def_readwrite("max_batch", &Engine::Options::max_batch)
      .def_readwrite("page_size", &Engine::Options::page_size)
      .def_readwrite("ctx_size", &Engine::Options::ctx_size)
      .def_readwrite("kv_memory", &Engine::Options::kv_memory)
      .def_readwrite("max_queue", &Engine::Options::max_queue)
      .def_readwrite("max_queue_tokens", &Engine::Options::max_queue_tokens)
      .def_readwrite("prefix_cache", &Engine::Options::prefix_cache)
      .def_readwrite("cuda_graph", &Engine::Options::cuda_graph)
      .def_readwrite("speculate", &Engine::Options::speculate);
  py::class_<Seats::Taken, Seat>(
      m, "Seat", "A place among max_queue requests, until the object is gone and its request has ended.");
  py::class_<Outcome>(m, "Outcome", "How a submitted request ended.")
      .def_readonly("timings", &Outcome::timings)
      .def_property_readonly(
          "trace", [](const Outcome& outcome) { return outcome.generation.trace; },
          "A RequestTrace, however the request ended; None unless it was traced.")
      .def("result", &result, "The Generation; raises the error that ended the request.");
  py::class_<Engine, std::unique_ptr<Engine, DeleteWithoutGil>>(m, "Engine")
      .def(py::init([](std::shared_ptr<MixtralImpl> model, std::optional<Tokenizer> tokenizer,
                       const Engine::Options& options) {
             return std::unique_ptr<Engine, DeleteWithoutGil>(
                 new Engine(Mixtral(std::move(model)), std::move(tokenizer), options));
           }),
           py::arg("model"), py::arg("tokenizer"), py::arg("options"))
      .def("generate", &generate, py::arg("prompts"), py::arg("params"), py::arg("experts_per_token"), py::arg("trace"),
           py::arg("on_text"), py::arg("n") = 1)
      .def("submit", &submit, py::arg("prompt"), py::arg("params"), py::arg("experts_per_token"), py::arg("on_text"),
           py::arg("on_end"), py::arg("constrained") = false,
           "-> the request's id. The callbacks run on the engine's thread.")
      .def("allow", &allow, py::arg("ids"), py::arg("masks"), ReleaseGil(),
           "Says which tokens the next ones of constrained requests may be: for each the bytes of int32 "
           "[ceil(vocab / 32)], where bit i % 32 of word i / 32 allows token i.")
      .def("cancel", &Engine::cancel, py::arg("id"), ReleaseGil())
      .def("save_prompt_cache", &Engine::save_prompt_cache, py::arg("ids"), py::arg("file"), ReleaseGil())
      .def("load_prompt_cache", &Engine::load_prompt_cache, py::arg("file"), ReleaseGil())
      .def("reserve_seats", &Engine::reserve_seats, py::arg("count"),
           "-> [Seat]. Raises QueueFull when there are not as many now, ValueError when there never are.")
      .def("stats", &Engine::stats)
      .def("failure", &Engine::failure,
           "Why the engine takes no more requests: a process that holds a part of the model has ended or is silent. "
           "None "
           "while all is well.")
      .def("check_integrity", &Engine::check_integrity, ReleaseGil())
      .def("routing_counts", &routing_counts,
           "-> (tokens, first [L][E], chosen [L][E]) of all requests so far; None where nothing is counted.")
      .def("stop", &Engine::stop, ReleaseGil(), "Cancels all requests; the engine takes no more.");
  m.def("sample_seed", &sample_seed, py::arg("seed"), py::arg("index"),
        "The seed of sample `index` of several of one prompt; the first one's is `seed` itself.");
  m.def("score_continuations", &score_pairs, py::arg("model"), py::arg("contexts"), py::arg("continuations"),
        py::arg("chunk_size"), py::arg("progress"), "-> [(log-probability, is_greedy)]");
  m.attr("CHUNK_SIZE") = kChunkSize;
  m.def("score", &score_text, py::arg("model"), py::arg("tokenizer"), py::arg("text"), py::arg("ctx_size"),
        py::arg("chunk_size"), ReleaseGil());
}

}  // namespace mixtral
