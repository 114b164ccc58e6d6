// engine/context_score.h, passkey.h and reach.h. Results are JSON, as the binary prints them; Python makes it a dict.
#include <nlohmann/json.hpp>

#include "../engine/context_score.h"
#include "../engine/passkey.h"
#include "../engine/reach.h"
#include "../model/transformer.h"
#include "bindings.h"

namespace mixtral {
namespace {

void check_interrupt(int64_t, int64_t) {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::string context_perplexity(MixtralImpl& model, int64_t bos, const std::vector<std::vector<int64_t>>& ids,
                               const std::vector<std::vector<int64_t>>& bytes, const std::vector<int64_t>& contexts,
                               const std::string& protocol, const std::string& targets, int64_t ctx_size,
                               int64_t chunk_size) {
  ContextOptions options;
  options.contexts = contexts;
  options.protocol = parse_protocol(protocol);
  options.targets = parse_targets(targets, options.protocol);
  options.ctx_size = ctx_size;
  options.chunk_size = chunk_size;
  options.progress = check_interrupt;
  std::vector<Document> documents;
  for (size_t d = 0; d < ids.size(); ++d) documents.push_back({ids[d], bytes[d]});
  return to_json(score_contexts(model, bos, documents, options), model.config(), /*window_means=*/true).dump();
}

std::string passkey_json(MixtralImpl& model, const Tokenizer& tokenizer, const std::vector<int64_t>& lengths,
                         int64_t depths, int64_t trials, const std::string& style, int64_t digits, int64_t distances,
                         uint64_t seed, int64_t ctx_size, int64_t chunk_size) {
  const PasskeyOptions options{lengths,    depths,         trials, parse_passkey_style(style),
                               digits,     distances,      seed,   ctx_size,
                               chunk_size, check_interrupt};
  return to_json(passkey(model, tokenizer, options), model.config()).dump();
}

std::string reach_json(MixtralImpl& model, int64_t trials, int64_t ctx_size, uint64_t seed) {
  return to_json(measure_reach(model, {trials, ctx_size, seed, check_interrupt})).dump();
}

std::pair<std::vector<int64_t>, std::vector<int64_t>> ids_and_bytes(const Tokenizer& tokenizer,
                                                                    const std::string& text) {
  Document document = make_document(tokenizer, text);
  return {std::move(document.ids), std::move(document.bytes)};
}

py::dict prompt_dict(const Tokenizer& tokenizer, const std::string& style, int64_t length, double depth,
                     const std::string& key, const std::string& name) {
  const PasskeyPrompt prompt = passkey_prompt(tokenizer, parse_passkey_style(style), length, depth, key, name);
  py::dict result;
  result["ids"] = prompt.ids;
  result["answer"] = prompt.answer;
  result["needle"] = prompt.needle;
  result["distance"] = prompt.distance;
  return result;
}

}  // namespace

void bind_long_context(py::module_& m) {
  m.def("context_perplexity", &context_perplexity, py::arg("model"), py::arg("bos"), py::arg("ids"), py::arg("bytes"),
        py::arg("contexts"), py::arg("protocol"), py::arg("targets"), py::arg("ctx_size"), py::arg("chunk_size"),
        ReleaseGil());
  m.def("passkey", &passkey_json, py::arg("model"), py::arg("tokenizer"), py::arg("lengths"), py::arg("depths"),
        py::arg("trials"), py::arg("style"), py::arg("digits"), py::arg("distances"), py::arg("seed"),
        py::arg("ctx_size"), py::arg("chunk_size"), ReleaseGil());
  m.def("reach", &reach_json, py::arg("model"), py::arg("trials"), py::arg("ctx_size"), py::arg("seed"), ReleaseGil());
  m.def("ids_and_bytes", &ids_and_bytes, py::arg("tokenizer"), py::arg("text"),
        "-> (token ids without BOS, the bytes of the text that each stands for).");
  m.def("passkey_prompt", &prompt_dict, py::arg("tokenizer"), py::arg("style"), py::arg("length"), py::arg("depth"),
        py::arg("key"), py::arg("name"));
}

}  // namespace mixtral
