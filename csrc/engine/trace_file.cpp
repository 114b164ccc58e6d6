#include "trace_file.h"

#include <algorithm>
#include <map>
#include <utility>

#include "../checkpoint/output_folder.h"
#include "../io/json.h"
#include "../io/load_error.h"
#include "../io/safetensors.h"
#include "../io/safetensors_writer.h"

namespace mixtral {
namespace {

using nlohmann::json;

constexpr const char* kFormatVersion = "1";

// Calls f(name, dtype, values, shape) for every tensor of the file, in its order.
template <typename AnyTrace, typename F>
void visit_tensors(AnyTrace& trace, F f) {
  auto& routing = trace.routing;
  const int64_t n = trace.tokens();
  const std::vector<int64_t> one = {n}, chosen = {n, routing.layers, routing.top_k},
                             all = {n, routing.layers, routing.experts}, next = {n, routing.layers - 1, routing.top_k};
  f("token_id", "I32", trace.token_id, one);
  f("predicted_id", "I32", trace.predicted_id, one);
  f("position", "I32", trace.position, one);
  f("doc", "I32", trace.doc, one);
  f("domain", "U8", trace.domain, one);
  f("special", "U8", trace.special, one);
  f("topk_ids", "U8", routing.topk_ids, chosen);
  f("topk_weights", "F16", routing.topk_weights, chosen);
  f("router_logits", "F16", routing.router_logits, all);
  f("next_gate_ids", "U8", routing.next_gate_ids, next);
}

std::map<std::string, std::string> metadata_of(const Trace& trace) {
  return {{"kind", "mixtral routing trace"},
          {"version", kFormatVersion},
          {"model", trace.model},
          {"tokenizer", trace.tokenizer},
          {"domains", json(trace.domains).dump(-1, ' ', false, json::error_handler_t::replace)},
          {"top_k", std::to_string(trace.routing.top_k)},
          {"num_experts", std::to_string(trace.routing.experts)}};
}

class TraceReader {
 public:
  explicit TraceReader(const std::filesystem::path& path) : file_(open_safetensors(path)) {
    check(text("kind") == "mixtral routing trace", "", "is no trace: write one with --trace");
    check(text("version") == kFormatVersion, "version",
          "must be " + std::string(kFormatVersion) + ", got " + text("version") + "; write the trace again");
  }

  Trace read() const {
    Trace trace;
    trace.model = text("model");
    trace.tokenizer = text("tokenizer");
    const json domains = parse_json("{\"domains\":" + text("domains") + "}", file_.path())["domains"];
    check(
        domains.is_array() && std::all_of(domains.begin(), domains.end(), [](const json& d) { return d.is_string(); }),
        "domains", "must be a list of names, got " + shown(domains));
    trace.domains = domains.get<std::vector<std::string>>();
    const std::vector<int64_t> shape = entry("topk_ids").shape;
    check(shape.size() == 3, "topk_ids", "must be [N, L, K]");
    check(shape[1] > 0 && shape[2] > 0, "topk_ids", "must have at least one layer and one expert per token");
    trace.routing.layers = shape[1];
    trace.routing.top_k = shape[2];
    const std::string experts = text("num_experts");
    check(!experts.empty() && experts.size() <= 3 && experts.find_first_not_of("0123456789") == std::string::npos,
          "num_experts", "must be a number in [1, 256], got " + experts);
    trace.routing.experts = std::stoll(experts);
    check(entry("token_id").shape == std::vector<int64_t>{shape[0]}, "token_id", "must be [N], as topk_ids says");
    trace.token_id.resize(static_cast<size_t>(shape[0]));
    visit_tensors(trace, [this](const char* name, const char* dtype, auto& values, const std::vector<int64_t>& shape) {
      read_into(name, dtype, values, shape);
    });
    check_values(trace);
    return trace;
  }

 private:
  void check(bool condition, const std::string& item, const std::string& reason) const {
    if (!condition) throw LoadError(file_.path(), item, reason);
  }

  std::string text(const char* key) const {
    const auto found = file_.metadata().find(key);
    return found == file_.metadata().end() ? "" : found->second;
  }

  const TensorEntry& entry(const std::string& name) const {
    const auto found = file_.entries().find(name);
    check(found != file_.entries().end(), name, "is missing");
    return found->second;
  }

  template <typename T>
  void read_into(const std::string& name, const char* dtype, std::vector<T>& values,
                 const std::vector<int64_t>& shape) const {
    const bool optional = name == "router_logits" || name == "next_gate_ids";
    if (optional && file_.entries().count(name) == 0) return;
    const TensorEntry& found = entry(name);
    check(found.dtype == dtype && found.shape == shape, name, "has another type or shape than the other tensors say");
    values.resize((found.end - found.begin) / sizeof(T));
    file_.read(found.begin, values.data(), values.size() * sizeof(T));
  }

  void check_values(const Trace& trace) const {
    const Routing& routing = trace.routing;
    check(trace.tokens() > 0, "token_id", "must not be empty");
    const auto below = [](const std::vector<uint8_t>& values, size_t end) {
      return std::all_of(values.begin(), values.end(), [end](uint8_t value) { return value < end; });
    };
    for (const auto& [name, ids] :
         {std::pair("topk_ids", &routing.topk_ids), {"next_gate_ids", &routing.next_gate_ids}})
      check(below(*ids, static_cast<size_t>(routing.experts)), name,
            "must be below num_experts, " + std::to_string(routing.experts));
    check(below(trace.domain, trace.domains.size()), "domain",
          "must be below the number of domains, " + std::to_string(trace.domains.size()));
  }

  const TensorFile file_;
};

}  // namespace

void write_trace(const Trace& trace, const std::filesystem::path& path) {
  replace_file(path, [&trace](OutputFile& file) {
    std::vector<StoredTensor> tensors;
    visit_tensors(trace, [&](const char* name, const char* dtype, const auto& values, std::vector<int64_t> shape) {
      if (!values.empty() || shape.size() == 1)
        tensors.push_back({name, dtype, std::move(shape), values.size() * sizeof(values[0])});
    });
    const std::string header = safetensors_header(tensors, metadata_of(trace));
    file.write(header.data(), header.size());
    visit_tensors(trace, [&](const char*, const char*, const auto& values, const std::vector<int64_t>&) {
      file.write(values.data(), values.size() * sizeof(values[0]));
    });
  });
}

Trace read_trace(const std::filesystem::path& path) { return TraceReader(path).read(); }

}  // namespace mixtral
