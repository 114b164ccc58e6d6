#include "trace.h"

#include <algorithm>
#include <cstdio>

#include "../io/load_error.h"
#include "../model/transformer.h"
#include "fingerprint.h"
#include "packed_passes.h"
#include "replay.h"
#include "require.h"
#include "routing_observer.h"
#include "trace_file.h"

namespace mixtral {
Trace trace_sequences(MixtralImpl& model, const std::vector<std::vector<int64_t>>& sequences,
                      const std::vector<int32_t>& docs, const std::vector<uint8_t>& domains,
                      const TraceOptions& options) {
  require(options.chunk_size > 0, "trace: chunk_size must be > 0, got " + std::to_string(options.chunk_size));
  check_sequences(model, sequences, [&](size_t i) { return "trace: document " + std::to_string(docs.at(i)); });
  const Config& config = model.config();
  const int64_t top_k = options.experts_per_token > 0 ? options.experts_per_token : config.top_k;
  Trace trace = empty_trace(config, top_k);
  config.check_experts_per_token(top_k);
  trace.model = trace_fingerprint(model);
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (size_t i = 0; i < sequences[s].size(); ++i) {
      trace.token_id.push_back(static_cast<int32_t>(sequences[s][i]));
      trace.position.push_back(static_cast<int32_t>(i));
      trace.doc.push_back(docs.at(s));
      trace.domain.push_back(domains.at(s));
    }
  }
  Routing& routing = trace.routing;
  const int64_t total = trace.tokens();
  routing.topk_ids.reserve(static_cast<size_t>(total * routing.layers * routing.top_k));
  routing.topk_weights.reserve(routing.topk_ids.capacity());
  if (options.logits) {
    routing.router_logits.reserve(static_cast<size_t>(total * routing.layers * routing.experts));
    routing.next_gate_ids.reserve(static_cast<size_t>(total * (routing.layers - 1) * routing.top_k));
  }
  for_each_pass(model, sequences, std::min(options.chunk_size, total), [&](Batch batch, RollingKVCache& cache) {
    RoutingObserver observer(config, options.logits);
    batch.routing = &observer;
    batch.experts_per_token = top_k;
    const auto predicted = model.logits(model.hidden_states(batch, &cache)).argmax(1).to(torch::kCPU, torch::kInt32);
    const int32_t* const first = predicted.data_ptr<int32_t>();
    trace.predicted_id.insert(trace.predicted_id.end(), first, first + predicted.numel());
    observer.append_to(routing, 0, predicted.numel());
    if (options.progress) options.progress(routing.tokens(), total);
  });
  return trace;
}

torch::Tensor replay(MixtralImpl& model, const Trace& trace, const TraceOptions& options) {
  require(trace.tokens() > 0 && trace.routing.tokens() == trace.tokens(), "replay: trace must not be empty");
  check_same_model(trace, model);
  model.config().check_experts_per_token(trace.routing.top_k);
  std::vector<std::vector<int64_t>> sequences;
  for (size_t i = 0; i < trace.token_id.size(); ++i) {
    if (trace.position[i] == 0) sequences.emplace_back();
    require(!sequences.empty() && static_cast<size_t>(trace.position[i]) == sequences.back().size(),
            "replay: position must count from 0 in each sequence, got " + std::to_string(trace.position[i]) +
                " at token " + std::to_string(i));
    sequences.back().push_back(trace.token_id[i]);
  }
  check_sequences(model, sequences, [](size_t i) { return "replay: sequence " + std::to_string(i); });
  for (const uint8_t id : trace.routing.topk_ids)
    require(
        id < model.config().num_experts,
        "replay: topk_ids must be below " + std::to_string(model.config().num_experts) + ", got " + std::to_string(id));
  const int64_t total = trace.tokens();
  auto logits = torch::empty({total, model.config().vocab_size}, torch::kFloat32);
  int64_t done = 0;
  for_each_pass(model, sequences, std::min(options.chunk_size, total), [&](Batch batch, RollingKVCache& cache) {
    RoutingObserver observer(model.config(), /*keep_logits=*/false);
    const int64_t count = batch.input_ids.size(0);
    observer.force(trace.routing, done, count);
    batch.routing = &observer;
    batch.experts_per_token = trace.routing.top_k;
    logits.narrow(0, done, count).copy_(model.logits(model.hidden_states(batch, &cache)));
    done += count;
    if (options.progress) options.progress(done, total);
  });
  return logits;
}

Replays read_replays(const std::filesystem::path& path, const MixtralImpl& model) {
  const Trace trace = read_trace(path);
  try {
    check_same_model(trace, model);
    return Replays(trace);
  } catch (const std::invalid_argument& error) {
    throw LoadError(path, "", error.what());
  }
}

void describe_tokens(Trace& trace, const Tokenizer* tokenizer, const Config& config) {
  const auto is_special = [&](int64_t id) {
    if (tokenizer) return tokenizer->is_control(id);
    const auto& eos = config.eos_token_ids;
    return id == config.bos_token_id || std::find(eos.begin(), eos.end(), id) != eos.end();
  };
  trace.special.clear();
  for (const int32_t id : trace.token_id) trace.special.push_back(is_special(id) ? 1 : 0);
  if (tokenizer) {
    trace.tokenizer = to_string(tokenizer->version()) + ", " + std::to_string(tokenizer->vocab_size()) + " ids";
  }
}

std::string trace_fingerprint(const MixtralImpl& model) {
  Config config = model.config();
  config.top_k = 1;  // the same model, whatever k it runs with
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(fingerprint(model, config)));
  return text;
}

Trace empty_trace(const Config& config, int64_t experts_per_token) {
  require(config.is_moe(), "trace: the model has no experts, so there is nothing to trace");
  require(config.num_experts <= 256,
          "trace: the model must have at most 256 experts, got " + std::to_string(config.num_experts));
  Trace trace;
  trace.domains = {"text"};
  trace.routing.layers = config.num_layers;
  trace.routing.top_k = experts_per_token;
  trace.routing.experts = config.num_experts;
  return trace;
}

void check_same_model(const Trace& trace, const MixtralImpl& model) {
  check_same_model(trace, model.config(), trace_fingerprint(model));
}

void check_same_model(const Trace& trace, const Config& config, const std::string& fingerprint) {
  const bool fits = trace.routing.layers == config.num_layers && trace.routing.experts == config.num_experts;
  require(fits && trace.model == fingerprint, "is a trace of another model, type or device: trace this one again");
}

void check_same_tokens(const Trace& trace, size_t begin, const std::vector<int64_t>& ids) {
  for (size_t i = 0; i < ids.size(); ++i) {
    const std::string here = "replay: token " + std::to_string(begin + i) + " is " + std::to_string(ids[i]);
    require(begin + i < trace.token_id.size(),
            here + ", and the trace ends after " + std::to_string(trace.tokens()) + " tokens");
    require(trace.token_id[begin + i] == ids[i],
            here + ", in the trace it is " + std::to_string(trace.token_id[begin + i]) + ": replay the traced text");
  }
}

}  // namespace mixtral
