// Which experts every token went to, in every layer. No torch in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../model/config.h"
#include "../model/defaults.h"
#include "../text/tokenizer.h"

namespace mixtral {

class MixtralImpl;

// What the routers decided for N tokens.
struct Routing {
  int64_t layers = 0, top_k = 0, experts = 0;
  std::vector<uint8_t> topk_ids;        // [N,L,K], falling weights
  std::vector<uint16_t> topk_weights;   // [N,L,K], bits of f16
  std::vector<uint16_t> router_logits;  // [N,L,E], bits of f16; empty unless asked for
  std::vector<uint8_t> next_gate_ids;   // [N,L-1,K], what layer l + 1's router makes of layer l's input; as above

  int64_t tokens() const { return layers == 0 ? 0 : static_cast<int64_t>(topk_ids.size()) / (layers * top_k); }
  const uint8_t* experts_of(int64_t token) const { return topk_ids.data() + token * layers * top_k; }  // [L,K]
};

// N tokens of several documents, one document after the other, with their routing.
struct Trace {
  std::vector<int32_t> token_id;
  std::vector<int32_t> predicted_id;  // the model's most likely next token; -1 where its logits were not computed
  std::vector<int32_t> position;      // in the sequence that the model read; 0 begins a sequence
  std::vector<int32_t> doc;           // the document's number; a long one may be several sequences
  std::vector<uint8_t> domain;        // of the document: an index of `domains`
  std::vector<uint8_t> special;       // 1: BOS or another control token, which analyses leave out
  Routing routing;
  std::vector<std::string> domains;
  std::string model;      // its fingerprint, in hexadecimal digits
  std::string tokenizer;  // its kind and size, in words; empty: none

  int64_t tokens() const { return static_cast<int64_t>(token_id.size()); }
};

struct TraceOptions {
  bool logits = false;                                        // keep router_logits and next_gate_ids too
  int64_t experts_per_token = 0;                              // 0: as many as the config says
  int64_t chunk_size = kChunkSize;                            // tokens per forward pass; does not change the result
  std::function<void(int64_t done, int64_t total)> progress;  // tokens, after each pass; may throw to end the work
};

// Of no tokens. Throws std::invalid_argument for a model without experts or with more than 256.
Trace empty_trace(const Config& config, int64_t experts_per_token);
// 16 hexadecimal digits; the same whatever k the model runs with.
std::string trace_fingerprint(const MixtralImpl& model);

// Runs the sequences, many of them in one pass, and keeps what the routers decided. docs, domains: of each sequence, as
// in the trace. Throws std::invalid_argument for a
// model without experts or with more than 256, an empty or too long sequence, an id outside the vocabulary, or an
// option out of range; OutOfMemory when the key/value cache does not fit.
Trace trace_sequences(MixtralImpl& model, const std::vector<std::vector<int64_t>>& sequences,
                      const std::vector<int32_t>& docs, const std::vector<uint8_t>& domains,
                      const TraceOptions& options);

// Names the tokenizer, and marks its control tokens; without one, BOS and the end-of-sequence tokens of the config.
void describe_tokens(Trace& trace, const Tokenizer* tokenizer, const Config& config);

// Throws std::invalid_argument unless the trace is of this model, or of the one with this fingerprint.
void check_same_model(const Trace& trace, const MixtralImpl& model);
void check_same_model(const Trace& trace, const Config& config, const std::string& fingerprint);
// Throws std::invalid_argument unless the trace's tokens from `begin` on begin with `ids`.
void check_same_tokens(const Trace& trace, size_t begin, const std::vector<int64_t>& ids);

}  // namespace mixtral
