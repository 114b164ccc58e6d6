#include "perplexity_contexts.h"

#include <cstdio>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "../checkpoint/config_reader.h"
#include "../engine/context_score.h"
#include "child.h"
#include "figure.h"
#include "load.h"
#include "report.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// The texts of a file: those under "text" in the lines of a .jsonl file, else the file itself.
std::vector<std::string> read_texts(const std::string& file) {
  const std::string content = read_text(file);
  if (!ends_with(file, ".jsonl")) return {content};
  std::vector<std::string> texts;
  std::istringstream lines(content);
  std::string line;
  for (int64_t number = 1; std::getline(lines, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const auto object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object() || !object.contains("text") || !object["text"].is_string()) {
      throw std::invalid_argument(file + ", line " + std::to_string(number) +
                                  ": must be a JSON object with the document under \"text\"");
    }
    texts.push_back(object["text"]);
  }
  return texts;
}

std::vector<Document> read_documents(const Tokenizer& tokenizer, const std::vector<std::string>& texts,
                                     int64_t document_tokens) {
  std::vector<Document> documents;
  for (const std::string& text : texts) {
    Document document = make_document(tokenizer, text);
    if (document_tokens > 0) {
      for (Document& piece : cut(document, document_tokens)) documents.push_back(std::move(piece));
    } else {
      documents.push_back(std::move(document));
    }
  }
  return documents;
}

// Bits per byte of the text under `xz -9`, for comparison: null where the program xz is not installed.
nlohmann::json xz_bits_per_byte(const std::vector<std::string>& texts) {
  std::string all;
  for (const std::string& text : texts) all += text;
  const ChildResult xz = run_child({"xz", "-9", "-c", "-q", "-T1"}, all);
  if (xz.status != 0) return nullptr;
  return 8.0 * static_cast<double>(xz.output.size()) / static_cast<double>(all.size());
}

std::string contexts_text(const nlohmann::json& result) {
  std::string text = "protocol " + result["protocol"].get<std::string>() + ", " + result["documents"].dump() +
                     " documents, standard errors over " + result["standard_error_over"].get<std::string>() + "\n";
  if (result["skipped"] > 0) text += result["skipped"].dump() + " documents are too short and left out\n";
  text += "\n context  targets  nats/token     +-      perplexity  bits/byte   change     +- (paired)\n";
  for (const auto& row : result["contexts"]) {
    char line[200], change[60] = "";
    if (row.contains("change")) {
      std::snprintf(change, sizeof change, "  %+.5f  %.5f", row["change"]["nll"].get<double>(),
                    row["change"]["standard_error"].get<double>());
    }
    std::snprintf(line, sizeof line, "%8lld %8lld  %10.5f  %7.5f  %10.4f  %9.5f%s\n", row["context"].get<long long>(),
                  row["targets"].get<long long>(), row["nll"].get<double>(), row["standard_error"].get<double>(),
                  row["perplexity"].get<double>(), row["bits_per_byte"].get<double>(), change);
    text += line;
    if (row.contains("mean_of_window_means")) {
      std::snprintf(line, sizeof line, "%17s  %10.5f  the mean of the windows' means (YaRN's script)\n", "",
                    row["mean_of_window_means"].get<double>());
      text += line;
    }
  }
  text += "\n";
  if (result["xz_bits_per_byte"].is_number()) {
    char line[80];
    std::snprintf(line, sizeof line, "xz -9 of the text  %.5f bits per byte\n",
                  result["xz_bits_per_byte"].get<double>());
    text += line;
  }
  if (result["reach"].is_number()) {
    text += "window " + result["window"].dump() + ": what is further back than " + result["reach"].dump() +
            " tokens changes no bit\n";
  }
  return text;
}

}  // namespace

std::string read_text(const std::string& file) {
  std::string text = read_file(file);
  if (text.find('\0') != std::string::npos) throw std::invalid_argument(file + " is no text: it has a zero byte");
  return text;
}

void add_context_flags(CLI::App& command, ContextFlags& flags) {
  const std::string group = "Loss by context";
  const auto own = [&](CLI::Option* option) { flags.need_contexts.push_back(option->group(group)); };
  add_option(command, "--contexts", flags.contexts, "Lengths of context in tokens, such as 64,128,256")
      ->delimiter(',')
      ->group(group);
  own(add_option(command, "--protocol", flags.protocol, "fixed, sliding:S, buckets or disjoint")
          ->capture_default_str());
  own(add_option(command, "--targets", flags.targets,
                 "Score the last N tokens of each document, or all; default: last:256 for fixed and sliding, else all")
          ->type_name("last:N|all"));
  own(add_option(command, "--document-tokens", flags.document_tokens,
                 "Cut the text into documents of this many tokens; 0: a text is one")
          ->check(at_least(0))
          ->capture_default_str());
  own(add_switch(command, "--window-means", flags.window_means,
                 "Also the mean of the windows' means, as YaRN's script prints it; compare it with nothing else"));
  own(add_svg_flag(command, flags.result));
}

void run_contexts(const ModelFlags& model, const ContextFlags& flags, const std::string& file) {
  ContextOptions options;
  options.contexts = flags.contexts;
  options.protocol = parse_protocol(flags.protocol);
  options.targets = parse_targets(flags.targets, options.protocol);
  options.ctx_size = model.ctx_size;
  options.chunk_size = model.chunk_size;
  options.kv_memory = model.kv_memory;
  const std::vector<std::string> texts = read_texts(file);
  check_figure(flags.result.svg);
  const Config config = read_config(model_path(model));
  const Tokenizer tokenizer = load_tokenizer(model);
  const std::vector<Document> documents = read_documents(tokenizer, texts, flags.document_tokens);
  check_contexts(config, documents, options);

  LoadedEngine loaded = load_idle_engine(model, tokenizer);
  ProgressBar bar("scoring", tokens_text);
  options.progress = progress_on(bar);
  const double start = seconds_now();
  const ContextReport report = score_contexts(loaded.engine.model(), tokenizer.bos_id(), documents, options);
  nlohmann::json result = to_json(report, config, flags.window_means);
  result["dtype"] = weight_type_of(model, config).name();
  result["seconds"] = seconds_now() - start;
  result["xz_bits_per_byte"] = xz_bits_per_byte(texts);
  write_result("perplexity", result, contexts_text(result), flags.result);
}

}  // namespace mixtral::app
