// How far a model looks back, measured: which outputs change, bit for bit, when one input token changes.
//
// With W keys in the window, the query's own included, a layer passes a change on to the W - 1 tokens behind it, and L
// layers to L * (W - 1) (Jiang et al., "Mistral 7B", 2023, section 2). Nothing further back has any influence.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "../model/config.h"
#include "../model/defaults.h"

namespace mixtral {

class MixtralImpl;

struct ReachOptions {
  int64_t trials = 4;    // random texts, in each of which one token is replaced
  int64_t ctx_size = 0;  // most tokens of a text; 0: the model's max_position
  uint64_t seed = 0;
  std::function<void(int64_t done, int64_t total)> progress;  // tokens, after each forward pass; may throw
};

struct Reach {
  int64_t window = 0, layers = 0;
  std::optional<int64_t> field;  // layers * (window - 1); none without a window
  // changed[d]: the share of trials in which the output d tokens behind the replaced one has other bits.
  std::vector<double> changed;
  // The largest distance at which a bit changed, for each way to run the model: `whole`, one pass without a cache;
  // `packed`, the same between two neighbours; `chunked`, 100 tokens at a time through a cache; `rolling`, a page at
  // a time, so that the cache uses its few pages again and again.
  std::map<std::string, int64_t> farthest;
};

// Outputs are the hidden states behind the last norm, from which the logits follow. A text is a quarter longer than the
// field where ctx_size allows. Throws std::invalid_argument for an option out of range, OutOfMemory.
Reach measure_reach(MixtralImpl& model, const ReachOptions& options);
// "changed" has the distances as keys.
nlohmann::json to_json(const Reach& reach);

}  // namespace mixtral
