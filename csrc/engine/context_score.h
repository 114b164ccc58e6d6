// How well a model predicts a text, by the length of the context that it sees.
//
// The four protocols of the literature answer different questions, so a number without its protocol means little:
//   fixed      the last tokens of each document, behind more and more context: what a longer context is worth
//   sliding:S  windows of `context` tokens that move on by S (Press et al., "ALiBi", 2022; PI, arXiv 2306.15595)
//   buckets    one pass over the text, its tokens grouped by how many stand before them
//   disjoint   windows of `context` tokens side by side, as the rolling likelihood of lm-evaluation-harness cuts them
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "../model/config.h"
#include "../model/defaults.h"
#include "../text/tokenizer.h"

namespace mixtral {

class MixtralImpl;

struct Protocol {
  enum Kind { kFixed, kSliding, kBuckets, kDisjoint };
  Kind kind = kFixed;
  int64_t stride = 0;  // of kSliding

  std::string name() const;  // "fixed", "sliding:256", "buckets", "disjoint"
};
// Throws std::invalid_argument, as parse_targets does.
Protocol parse_protocol(const std::string& text);
// "last:N" -> N; "all" -> 0; "" -> what the protocol is used with: 256 for fixed and sliding, 0 for the others.
int64_t parse_targets(const std::string& text, const Protocol& protocol);

struct Document {
  std::vector<int64_t> ids;    // [n], without BOS
  std::vector<int64_t> bytes;  // [n]: of the text, that each token stands for
};
Document make_document(const Tokenizer& tokenizer, const std::string& text);
// The pieces of `tokens` tokens each, the last one shorter.
std::vector<Document> cut(const Document& document, int64_t tokens);

struct ContextOptions {
  std::vector<int64_t> contexts;  // in tokens, BOS included
  Protocol protocol;
  int64_t targets = 0;   // the last this many tokens of each document are scored; 0: all
  int64_t ctx_size = 0;  // longest context; 0: the model's max_position
  int64_t chunk_size = kChunkSize;
  int64_t kv_memory = 0;                                      // most bytes of keys and values; 0: as many as are needed
  std::function<void(int64_t done, int64_t total)> progress;  // tokens, after each forward pass; may throw
};

struct ContextScore {
  int64_t context = 0;
  int64_t targets = 0;           // tokens that were scored
  double nll = 0;                // nats per token: the sum over all targets, by their number
  double bits_per_byte = 0;      // of the targets' text
  double standard_error = 0;     // of nll
  double window_mean = 0;        // the mean over windows of each window's nll, as YaRN's script prints it
  std::optional<double> change;  // of nll, from the context before; where both scored the same targets
  double change_error = 0;       // its standard error, paired: target by target or document by document
};

struct ContextReport {
  Protocol protocol;
  std::vector<ContextScore> contexts;  // rising
  int64_t documents = 0, skipped = 0;  // scored; shorter than the longest context
};
nlohmann::json to_json(const ContextReport& report, const Config& config, bool window_means);

// Throws std::invalid_argument for an option out of range, and when no document is as long as the longest context. It
// needs no model: call it before one is loaded.
void check_contexts(const Config& config, const std::vector<Document>& documents, const ContextOptions& options);

// The context of a target is what the model sees of the document before it. Of `fixed` it is that of the first target;
// the later ones see the earlier ones too, as far as the longest context allows. Nothing beyond the context is ever an
// input. Documents begin with BOS. Positions are those in the document, but for `disjoint` and `buckets`, whose windows
// and segments are texts of their own.
//
// The standard error is that of a ratio of sums over documents, and over tokens when there is one document.
//
// Throws what check_contexts() and token_logprobs() throw.
ContextReport score_contexts(MixtralImpl& model, int64_t bos, const std::vector<Document>& documents,
                             const ContextOptions& options);

// The number of tokens behind the newest one that can change it: layers * (window - 1) (Jiang et al., "Mistral 7B",
// 2023, section 2). None without a window: all of them can.
std::optional<int64_t> receptive_field(const Config& config);

}  // namespace mixtral
