// mixtral._C: the C++ model for Python. Thin: values in, values out; the Python interface is python/mixtral/model.py.
//
// Everything that may take long runs without the GIL. Errors keep their meaning: LoadError -> mixtral.LoadError,
// std::invalid_argument -> ValueError, std::out_of_range -> IndexError, out of memory -> MemoryError.
#include <pybind11/stl/filesystem.h>
#include <torch/extension.h>

#include <memory>
#include <string>
#include <vector>

#include "../include/mixtral/mixtral.h"
#include "../model/memory.h"

namespace py = pybind11;

namespace mixtral {
namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// File names and pieces as stored need not be UTF-8.
py::str to_str(const std::string& text) {
  PyObject* str = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
  if (str == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::str>(str);
}

void set_error(PyObject* type, const c10::Error& error) { PyErr_SetString(type, error.what_without_backtrace()); }

void translate(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const LoadError& e) {
    const py::object type = py::module_::import("mixtral.errors").attr("LoadError");
    const py::object value = type(to_str(e.what()), to_str(e.file()), to_str(e.item()), to_str(e.reason()));
    PyErr_SetObject(type.ptr(), value.ptr());
  } catch (const OutOfMemory& e) {
    PyErr_SetString(PyExc_MemoryError, e.what());
  } catch (const c10::OutOfMemoryError& e) {
    set_error(PyExc_MemoryError, e);
  } catch (const c10::IndexError& e) {
    set_error(PyExc_IndexError, e);
  } catch (const c10::ValueError& e) {
    set_error(PyExc_ValueError, e);
  } catch (const c10::TypeError& e) {
    set_error(PyExc_TypeError, e);
  } catch (const c10::Error& e) {
    // The CPU allocator has no exception type of its own.
    const bool out_of_memory = std::string(e.what_without_backtrace()).find("DefaultCPUAllocator") != std::string::npos;
    set_error(out_of_memory ? PyExc_MemoryError : PyExc_RuntimeError, e);
  }
}

// Keyword arguments to the fields of a bound struct.
template <typename Struct>
Struct from_kwargs(const py::kwargs& fields) {
  py::object result = py::cast(Struct());
  for (const auto& [name, value] : fields) {
    if (!py::hasattr(result, name)) {
      throw py::type_error(py::str("{}: unexpected argument {!r}").format(py::type::of(result).attr("__name__"), name));
    }
    result.attr(name) = value;
  }
  return result.cast<Struct>();
}

void bind_config(py::module_& m) {
  py::class_<Config>(m, "Config", "The architecture of a checkpoint. Sizes are counts; `window` is keys a query sees.")
      .def(py::init([](const py::kwargs& fields) {
             const Config config = from_kwargs<Config>(fields);
             config.validate("Config");
             return config;
           }),
           "Config(hidden_size=..., num_layers=..., ...). Raises LoadError for a missing or unfit field.")
      .def_static("from_folder", &Config::from_folder, py::arg("folder"),
                  "Reads config.json or params.json. Raises LoadError naming the field.")
      .def_readwrite("hidden_size", &Config::hidden_size)
      .def_readwrite("intermediate_size", &Config::intermediate_size)
      .def_readwrite("num_layers", &Config::num_layers)
      .def_readwrite("num_heads", &Config::num_heads)
      .def_readwrite("num_kv_heads", &Config::num_kv_heads)
      .def_readwrite("head_dim", &Config::head_dim)
      .def_readwrite("vocab_size", &Config::vocab_size)
      .def_readwrite("max_position", &Config::max_position)
      .def_readwrite("num_experts", &Config::num_experts)
      .def_readwrite("top_k", &Config::top_k)
      .def_readwrite("renormalize", &Config::renormalize)
      .def_readwrite("router_in_f32", &Config::router_in_f32)
      .def_readwrite("rms_norm_eps", &Config::rms_norm_eps)
      .def_readwrite("rope_theta", &Config::rope_theta)
      .def_readwrite("window", &Config::window)
      .def_readwrite("window_source", &Config::window_source)
      .def_readwrite("tie_word_embeddings", &Config::tie_word_embeddings)
      .def_readwrite("dtype", &Config::dtype)
      .def_readwrite("quantization", &Config::quantization)
      .def_readwrite("bos_token_id", &Config::bos_token_id)
      .def_readwrite("eos_token_ids", &Config::eos_token_ids)
      .def_property_readonly("is_moe", &Config::is_moe)
      .def_property_readonly("total_parameters", &Config::total_parameters)
      .def_property_readonly("active_parameters", &Config::active_parameters, "Per token.")
      .def("kv_bytes_per_token", &Config::kv_bytes_per_token, py::arg("element_size"));
}

std::vector<int64_t> chat_ids(const Tokenizer& tokenizer, const std::vector<py::dict>& dicts) {
  std::vector<ChatMessage> messages;
  for (const py::dict& dict : dicts) {
    ChatMessage& message = messages.emplace_back();
    for (const auto& [key, value] : dict) {
      const auto name = key.cast<std::string>();
      if (name == "role") {
        message.role = value.cast<std::string>();
      } else if (name == "content") {
        message.content = value.cast<std::string>();
      } else if (name == "prefix") {
        message.prefix = value.cast<bool>();
      } else {
        throw std::invalid_argument("apply_chat: messages[" + std::to_string(messages.size() - 1) +
                                    "] expected the keys role, content and prefix, got " + name);
      }
    }
  }
  return apply_chat(tokenizer, messages);
}

void bind_tokenizer(py::module_& m) {
  py::class_<Tokenizer>(m, "Tokenizer", "SentencePiece BPE tokenizer of the Mistral family.")
      .def_static("available", &Tokenizer::available, "False in a build without sentencepiece: none can be made.")
      .def(
          py::init([](const std::filesystem::path& path, const std::optional<std::string>& version) {
            return version ? Tokenizer(path, parse_tokenizer_version(*version)) : Tokenizer(path);
          }),
          py::arg("path"), py::arg("version") = py::none(), ReleaseGil(),
          "path: a tokenizer.model file, or a folder that holds one. version: \"v1\", \"v2\", \"v3\" or \"v7\"; None:\n"
          "told by the file. Raises LoadError; ValueError for an unknown version.")
      .def("encode", &Tokenizer::encode, py::arg("text"), py::arg("add_bos") = false, py::arg("add_eos") = false,
           "Text to ids. \"[INST]\" or \"</s>\" in the text stays text.")
      .def("decode", &Tokenizer::decode, py::arg("ids"),
           "Ids to text; control tokens give nothing. Raises IndexError for an id outside the vocabulary.")
      .def(
          "piece", [](const Tokenizer& self, int64_t id) { return to_str(self.piece(id)); }, py::arg("id"),
          "The piece as stored. Raises IndexError for an id outside the vocabulary.")
      .def("apply_chat", &chat_ids, py::arg("messages"),
           "[{\"role\": \"user\", \"content\": \"Hi\"}, ...] to prompt ids, equal to mistral-common's. \"prefix\": "
           "True on the\n"
           "last message, an assistant's: the model goes on with it. Raises ValueError, naming the message.")
      .def("is_control", &Tokenizer::is_control, py::arg("id"))
      .def("is_byte", &Tokenizer::is_byte, py::arg("id"))
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size)
      .def_property_readonly("bos_id", &Tokenizer::bos_id)
      .def_property_readonly("eos_id", &Tokenizer::eos_id)
      .def_property_readonly("version", [](const Tokenizer& self) { return to_string(self.version()); });
  py::class_<StreamingDecoder>(m, "StreamingDecoder", "Ids in, text out, never half a code point.")
      .def(py::init<Tokenizer>(), py::arg("tokenizer"))
      .def("push", &StreamingDecoder::push, py::arg("id"), "Text completed by this token; may be empty.")
      .def("flush", &StreamingDecoder::flush, "What is left.");
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
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("stop", &SamplingParams::stop)
      .def_readwrite("logprobs", &SamplingParams::logprobs)
      .def_readwrite("ignore_eos", &SamplingParams::ignore_eos);
  py::class_<TokenLogprob>(m, "TokenLogprob",
                           "Natural-log probability of a generated token, and of the most likely ones.")
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
      .def("__repr__", [](const py::object& self) {
        return py::str("Generation(text={!r}, finish_reason={!r}, {} tokens)")
            .format(self.attr("text"), self.attr("finish_reason"), py::len(self.attr("token_ids")));
      });
  py::class_<Timings>(m, "Timings", "Of one generate call: seconds, tokens, and pages of the key/value cache.")
      .def_readonly("prefill_seconds", &Timings::prefill_seconds)
      .def_readonly("decode_seconds", &Timings::decode_seconds)
      .def_readonly("prompt_tokens", &Timings::prompt_tokens)
      .def_readonly("new_tokens", &Timings::new_tokens)
      .def_readonly("peak_pages", &Timings::peak_pages);
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

// A Python error raised in here (Ctrl-C, or one of the callback's) travels through the engine to the caller.
Engine::OnText on_text_from(const py::object& callback) {
  return [&callback](size_t index, const std::string& piece) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
    return callback.is_none() || callback(index, piece).cast<bool>();
  };
}

// -> ([Generation], Timings)
std::pair<std::vector<Generation>, Timings> generate(Engine& engine, const std::vector<std::vector<int64_t>>& prompts,
                                                     const SamplingParams& params, const py::object& on_text) {
  const Engine::OnText forward_text = on_text_from(on_text);
  const py::gil_scoped_release no_gil;
  Timings timings;
  std::vector<Generation> generations = engine.generate(prompts, {params}, forward_text, &timings);
  return {std::move(generations), timings};
}

Score score_text(MixtralImpl& model, const Tokenizer& tokenizer, const std::string& text, int64_t ctx_size,
                 int64_t chunk_size) {
  return score(model, tokenizer, text, {ctx_size, chunk_size, [](int64_t, int64_t) {
                                          const py::gil_scoped_acquire gil;  // for Ctrl-C
                                          if (PyErr_CheckSignals() != 0) throw py::error_already_set();
                                        }});
}

std::shared_ptr<MixtralImpl> from_pretrained(const std::filesystem::path& folder, torch::Device device,
                                             const std::string& dtype, bool pack, const py::object& progress) {
  LoadOptions options;
  options.device = device;
  options.dtype = dtype;
  options.pack = pack;
  options.progress = [&progress](uint64_t done, uint64_t total) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
    if (!progress.is_none()) {
      progress(done, total);
    }
  };
  const py::gil_scoped_release no_gil;
  return Mixtral::from_pretrained(folder, options).ptr();
}

std::shared_ptr<MixtralImpl> from_config(const Config& config, torch::Device device, const std::string& dtype,
                                         uint64_t seed) {
  const WeightType type = parse_weight_type(dtype, config, device, /*pack=*/false);
  auto model = std::make_shared<MixtralImpl>(config, type.dtype, device, type.packing);
  model->init_random(seed);
  return model;
}

py::dict named_parameters(const MixtralImpl& model) {
  py::dict parameters;
  for (const auto& item : model.named_parameters()) {
    parameters[py::str(item.key())] = item.value();
  }
  return parameters;
}

void bind_model(py::module_& m) {
  py::class_<MixtralImpl, std::shared_ptr<MixtralImpl>>(m, "Mixtral")
      .def_static("from_pretrained", &from_pretrained, py::arg("folder"), py::arg("device"), py::arg("dtype"),
                  py::arg("pack"), py::arg("progress"))
      .def_static("from_config", &from_config, py::arg("config"), py::arg("device"), py::arg("dtype"), py::arg("seed"),
                  ReleaseGil())
      .def("forward", &MixtralImpl::forward, py::arg("input_ids"), ReleaseGil())
      .def("score", &score_text, py::arg("tokenizer"), py::arg("text"), py::arg("ctx_size"), py::arg("chunk_size"),
           ReleaseGil())
      .def("named_parameters", &named_parameters)
      .def_property_readonly("config", [](const MixtralImpl& self) { return Config(self.config()); })
      .def_property_readonly("device", &MixtralImpl::device)
      .def_property_readonly("dtype", &MixtralImpl::dtype)
      .def_property_readonly("weight_type", [](const MixtralImpl& self) { return self.weight_type().name(); });
  py::class_<Engine::Options>(m, "EngineOptions")
      .def(py::init(&from_kwargs<Engine::Options>))
      .def_readwrite("chunk_size", &Engine::Options::chunk_size)
      .def_readwrite("token_budget", &Engine::Options::token_budget)
      .def_readwrite("max_batch", &Engine::Options::max_batch)
      .def_readwrite("page_size", &Engine::Options::page_size)
      .def_readwrite("ctx_size", &Engine::Options::ctx_size)
      .def_readwrite("cuda_graph", &Engine::Options::cuda_graph);
  py::class_<Engine>(m, "Engine")
      .def(py::init([](std::shared_ptr<MixtralImpl> model, std::optional<Tokenizer> tokenizer,
                       const Engine::Options& options) {
             return Engine(Mixtral(std::move(model)), std::move(tokenizer), options);
           }),
           py::arg("model"), py::arg("tokenizer"), py::arg("options"))
      .def("generate", &generate, py::arg("prompts"), py::arg("params"), py::arg("on_text"));
}

}  // namespace
}  // namespace mixtral

PYBIND11_MODULE(_C, m) {
  py::register_local_exception_translator(&mixtral::translate);
  mixtral::bind_config(m);
  mixtral::bind_tokenizer(m);
  mixtral::bind_results(m);
  mixtral::bind_model(m);
}
