#include "../engine/trace.h"

#include <torch/csrc/utils/pybind.h>

#include <cstring>

#include "../engine/append_document.h"
#include "../engine/replay.h"
#include "../engine/trace_file.h"
#include "../model/transformer.h"
#include "bindings.h"

namespace mixtral {
namespace {

constexpr auto kHalf = torch::kFloat16;

// The memory of a vector that lives as long as the trace, as a tensor.
template <typename T>
torch::Tensor view(const std::shared_ptr<Trace>& trace, std::vector<T>& values, std::vector<int64_t> shape,
                   torch::ScalarType dtype) {
  return torch::from_blob(
      values.data(), shape, [trace](void*) {}, dtype);
}

py::dict to_dict(const std::shared_ptr<Trace>& trace) {
  Trace& t = *trace;
  Routing& r = t.routing;
  const int64_t n = t.tokens();
  py::dict fields;
  fields["token_ids"] = view(trace, t.token_id, {n}, torch::kInt32);
  fields["predicted_ids"] = view(trace, t.predicted_id, {n}, torch::kInt32);
  fields["positions"] = view(trace, t.position, {n}, torch::kInt32);
  fields["docs"] = view(trace, t.doc, {n}, torch::kInt32);
  fields["domains"] = view(trace, t.domain, {n}, torch::kUInt8);
  fields["special"] = view(trace, t.special, {n}, torch::kUInt8).to(torch::kBool);
  fields["topk_ids"] = view(trace, r.topk_ids, {n, r.layers, r.top_k}, torch::kUInt8);
  fields["topk_weights"] = view(trace, r.topk_weights, {n, r.layers, r.top_k}, kHalf);
  fields["router_logits"] = py::none();
  if (!r.router_logits.empty()) fields["router_logits"] = view(trace, r.router_logits, {n, r.layers, r.experts}, kHalf);
  fields["next_gate_ids"] = py::none();
  if (!r.next_gate_ids.empty())
    fields["next_gate_ids"] = view(trace, r.next_gate_ids, {n, r.layers - 1, r.top_k}, torch::kUInt8);
  fields["domain_names"] = t.domains;
  fields["num_experts"] = r.experts;
  fields["model"] = t.model;
  fields["tokenizer"] = t.tokenizer;
  return fields;
}

// The numbers of a tensor of any integer or floating type.
template <typename T>
std::vector<T> numbers(const py::dict& fields, const char* name, torch::ScalarType dtype,
                       const std::vector<int64_t>& shape) {
  const auto given = fields[name].cast<torch::Tensor>();
  if (given.sizes() != torch::IntArrayRef(shape)) {
    throw std::invalid_argument(std::string("Trace: ") + name + " must have the shape " +
                                c10::str(torch::IntArrayRef(shape)) + ", got " + c10::str(given.sizes()));
  }
  const auto tensor = given.to(torch::kCPU, dtype).contiguous();
  std::vector<T> values(static_cast<size_t>(tensor.numel()));
  if (!values.empty()) std::memcpy(values.data(), tensor.data_ptr(), tensor.nbytes());
  return values;
}

Trace from_dict(const py::dict& fields) {
  Trace trace;
  const auto chosen = fields["topk_ids"].cast<torch::Tensor>().sizes().vec();
  if (chosen.size() != 3) {
    throw std::invalid_argument("Trace: topk_ids must be [N, L, K], got " + c10::str(torch::IntArrayRef(chosen)));
  }
  const std::vector<int64_t> one = {chosen[0]};
  Routing& routing = trace.routing;
  routing.layers = chosen[1];
  routing.top_k = chosen[2];
  routing.experts = fields["num_experts"].cast<int64_t>();
  trace.token_id = numbers<int32_t>(fields, "token_ids", torch::kInt32, one);
  trace.predicted_id = numbers<int32_t>(fields, "predicted_ids", torch::kInt32, one);
  trace.position = numbers<int32_t>(fields, "positions", torch::kInt32, one);
  trace.doc = numbers<int32_t>(fields, "docs", torch::kInt32, one);
  trace.domain = numbers<uint8_t>(fields, "domains", torch::kUInt8, one);
  trace.special = numbers<uint8_t>(fields, "special", torch::kUInt8, one);
  routing.topk_ids = numbers<uint8_t>(fields, "topk_ids", torch::kUInt8, chosen);
  routing.topk_weights = numbers<uint16_t>(fields, "topk_weights", kHalf, chosen);
  if (!fields["router_logits"].is_none()) {
    routing.router_logits = numbers<uint16_t>(fields, "router_logits", kHalf, {chosen[0], chosen[1], routing.experts});
  }
  if (!fields["next_gate_ids"].is_none()) {
    routing.next_gate_ids =
        numbers<uint8_t>(fields, "next_gate_ids", torch::kUInt8, {chosen[0], chosen[1] - 1, chosen[2]});
  }
  trace.domains = fields["domain_names"].cast<std::vector<std::string>>();
  trace.model = fields["model"].cast<std::string>();
  trace.tokenizer = fields["tokenizer"].cast<std::string>();
  return trace;
}

TraceOptions options_of(int64_t chunk_size, const py::object& progress) {
  TraceOptions options;
  options.chunk_size = chunk_size;
  options.progress = [&progress](int64_t done, int64_t total) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done, total);
  };
  return options;
}

// ids, docs and domains: of each sequence.
py::dict trace(MixtralImpl& model, const std::optional<Tokenizer>& tokenizer,
               const std::vector<std::vector<int64_t>>& ids, const std::vector<int32_t>& docs,
               const std::vector<uint8_t>& domains, const std::vector<std::string>& domain_names, bool logits,
               int64_t experts_per_token, int64_t chunk_size, const py::object& progress) {
  TraceOptions options = options_of(chunk_size, progress);
  options.logits = logits;
  options.experts_per_token = experts_per_token;
  const auto result = [&] {
    const py::gil_scoped_release no_gil;
    auto traced = std::make_shared<Trace>(trace_sequences(model, ids, docs, domains, options));
    describe_tokens(*traced, tokenizer ? &*tokenizer : nullptr, model.config());
    return traced;
  }();
  result->domains = domain_names;
  return to_dict(result);
}

torch::Tensor replay_trace(MixtralImpl& model, const py::dict& fields, int64_t chunk_size, const py::object& progress) {
  const Trace given = from_dict(fields);
  const TraceOptions options = options_of(chunk_size, progress);
  const py::gil_scoped_release no_gil;
  return replay(model, given, options);
}

// The traces of requests as one, in the order given. None may be null.
void write_request_traces(const std::vector<std::shared_ptr<Trace>>& requests, MixtralImpl& model,
                          const std::optional<Tokenizer>& tokenizer, int64_t experts_per_token,
                          const std::filesystem::path& path) {
  Trace all = empty_trace(model.config(), experts_per_token);
  for (const auto& request : requests) append_document(all, *request);
  all.model = trace_fingerprint(model);
  describe_tokens(all, tokenizer ? &*tokenizer : nullptr, model.config());
  write_trace(all, path);
}

}  // namespace

void bind_trace(py::module_& m) {
  py::class_<Trace, std::shared_ptr<Trace>>(m, "RequestTrace", "What the routers decided for one request.")
      .def("__len__", &Trace::tokens)
      .def_property_readonly("experts_per_token", [](const Trace& trace) { return trace.routing.top_k; });
  py::class_<Replays>(m, "Replays", "The sequences of a trace, for the requests that begin as they do.")
      .def(py::init(&read_replays), py::arg("path"), py::arg("model"), ReleaseGil(), "Raises LoadError.");
  m.def("write_request_traces", &write_request_traces, py::arg("requests"), py::arg("model"), py::arg("tokenizer"),
        py::arg("experts_per_token"), py::arg("path"), ReleaseGil(),
        "Each request a document of one trace file. Raises ValueError unless all have these experts per token.");
  m.def("trace", &trace, py::arg("model"), py::arg("tokenizer"), py::arg("ids"), py::arg("docs"), py::arg("domains"),
        py::arg("domain_names"), py::arg("logits"), py::arg("experts_per_token"), py::arg("chunk_size"),
        py::arg("progress"), "-> the fields of a Trace.");
  m.def("replay", &replay_trace, py::arg("model"), py::arg("fields"), py::arg("chunk_size"), py::arg("progress"));
  m.def(
      "read_trace",
      [](const std::filesystem::path& path) { return to_dict(std::make_shared<Trace>(read_trace(path))); },
      py::arg("path"), "-> the fields of a Trace. Raises LoadError.");
  m.def(
      "write_trace",
      [](const py::dict& fields, const std::filesystem::path& path) { write_trace(from_dict(fields), path); },
      py::arg("fields"), py::arg("path"));
}

}  // namespace mixtral
