// What goes into score_contexts() and what comes out of it. No torch.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "context_score.h"
#include "require.h"

namespace mixtral {
namespace {

constexpr int64_t kUsualTargets = 256;

// The number behind `prefix` in `text`, at least 1.
std::optional<int64_t> number_behind(const std::string& prefix, const std::string& text) {
  if (text.compare(0, prefix.size(), prefix) != 0) return std::nullopt;
  int64_t value = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data() + prefix.size(), last, value);
  return error == std::errc() && end == last && value > 0 ? std::optional(value) : std::nullopt;
}

}  // namespace

std::string Protocol::name() const {
  switch (kind) {
    case kFixed:
      return "fixed";
    case kSliding:
      return "sliding:" + std::to_string(stride);
    case kBuckets:
      return "buckets";
    default:
      return "disjoint";
  }
}

Protocol parse_protocol(const std::string& text) {
  if (const auto stride = number_behind("sliding:", text)) return {Protocol::kSliding, *stride};
  for (const Protocol protocol : {Protocol{Protocol::kFixed}, {Protocol::kBuckets}, {Protocol::kDisjoint}})
    if (text == protocol.name()) return protocol;
  throw std::invalid_argument("protocol must be fixed, sliding:S with a stride S > 0, buckets or disjoint, got " +
                              text);
}

int64_t parse_targets(const std::string& text, const Protocol& protocol) {
  if (text.empty()) return protocol.kind == Protocol::kFixed || protocol.kind == Protocol::kSliding ? kUsualTargets : 0;
  if (text == "all") return 0;
  if (const auto last = number_behind("last:", text)) return *last;
  throw std::invalid_argument("targets must be all, or last:N with N > 0, got " + text);
}

Document make_document(const Tokenizer& tokenizer, const std::string& text) {
  Document document;
  document.ids = tokenizer.encode(text);
  for (const int64_t id : document.ids) {
    const std::string piece = tokenizer.piece(id);
    int64_t bytes = tokenizer.is_control(id) ? 0 : tokenizer.is_byte(id) ? 1 : static_cast<int64_t>(piece.size());
    for (size_t at = 0; (at = piece.find("\u2581", at)) != std::string::npos; ++at) bytes -= 2;  // it is one space
    document.bytes.push_back(bytes);
  }
  // The space that encode() puts before the text is in no text.
  const int64_t total = std::accumulate(document.bytes.begin(), document.bytes.end(), int64_t{0});
  if (!document.bytes.empty()) document.bytes.front() += static_cast<int64_t>(text.size()) - total;
  return document;
}

std::vector<Document> cut(const Document& document, int64_t tokens) {
  require(tokens > 0, "document_tokens must be > 0, got " + std::to_string(tokens));
  std::vector<Document> pieces;
  const auto total = static_cast<int64_t>(document.ids.size());
  for (int64_t begin = 0; begin < total; begin += tokens) {
    const int64_t end = std::min(begin + tokens, total);
    pieces.push_back({{document.ids.begin() + begin, document.ids.begin() + end},
                      {document.bytes.begin() + begin, document.bytes.begin() + end}});
  }
  return pieces;
}

std::optional<int64_t> receptive_field(const Config& config) {
  if (config.window == 0) return std::nullopt;
  return config.num_layers * (config.window - 1);
}

void check_contexts(const Config& config, const std::vector<Document>& documents, const ContextOptions& options) {
  const int64_t limit = options.ctx_size > 0 ? options.ctx_size : config.max_position;
  require(!options.contexts.empty(), "contexts: at least one is needed");
  require(options.targets >= 0, "targets must be >= 0, got " + std::to_string(options.targets));
  require(options.chunk_size > 0, "chunk_size must be > 0, got " + std::to_string(options.chunk_size));
  for (const int64_t context : options.contexts) {
    require(context > 0, "contexts must be > 0, got " + std::to_string(context));
    require(context <= limit, "contexts must be at most " + std::to_string(limit) +
                                  ", the longest context of the model, got " + std::to_string(context) +
                                  " (ctx_size allows more)");
    require(options.protocol.kind != Protocol::kSliding || options.protocol.stride <= context,
            "sliding:" + std::to_string(options.protocol.stride) + " leaves tokens out: the stride must be at most " +
                std::to_string(context) + ", the shortest context");
  }
  const int64_t longest_context = *std::max_element(options.contexts.begin(), options.contexts.end());
  size_t longest = 0;
  for (const Document& document : documents) longest = std::max(longest, document.ids.size());
  require(longest > 0, "the text has no tokens");
  require(static_cast<int64_t>(longest) >= longest_context,
          "the text is shorter than the context: " + std::to_string(longest) + " tokens" +
              (documents.size() > 1 ? " in the longest document" : "") + ", and contexts up to " +
              std::to_string(longest_context));
}

nlohmann::json to_json(const ContextReport& report, const Config& config, bool window_means) {
  nlohmann::json contexts = nlohmann::json::array();
  for (size_t i = 0; i < report.contexts.size(); ++i) {
    const ContextScore& score = report.contexts[i];
    nlohmann::json row = {{"context", score.context},
                          {"nll", score.nll},
                          {"perplexity", std::exp(score.nll)},
                          {"bits_per_byte", score.bits_per_byte},
                          {"standard_error", score.standard_error},
                          {"targets", score.targets}};
    if (score.change) {
      row["change"] = {
          {"from", report.contexts[i - 1].context}, {"nll", *score.change}, {"standard_error", score.change_error}};
    }
    if (window_means) row["mean_of_window_means"] = score.window_mean;
    contexts.push_back(std::move(row));
  }
  const auto field = receptive_field(config);
  return {{"protocol", report.protocol.name()},
          {"contexts", std::move(contexts)},
          {"documents", report.documents},
          {"skipped", report.skipped},
          {"standard_error_over", report.documents > 1 ? "documents" : "tokens"},
          {"window", config.window},
          {"reach", field ? nlohmann::json(*field) : nlohmann::json()}};
}

}  // namespace mixtral
