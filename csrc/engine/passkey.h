// Passkey retrieval: whether a model finds a number in a text, by the length of the text and the depth of the number
// (Mixtral paper, section 3.2). The prompts: passkey_prompt.h.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "../model/config.h"
#include "../model/defaults.h"
#include "passkey_prompt.h"

namespace mixtral {

class MixtralImpl;

struct PasskeyOptions {
  std::vector<int64_t> lengths;
  int64_t depths = 11;  // evenly from 0 to 1
  int64_t trials = 10;  // keys for each length and depth
  PasskeyStyle style = PasskeyStyle::kLandmark;
  int64_t digits = 0;  // of a key; 0: 5 for landmark, 7 for ruler
  // Also so many distances, evenly over the longest length, each with `trials` keys and no filler before the needle
  // (PI, arXiv 2306.15595, section 3.3); 0: none, and k_max comes from the cells.
  int64_t distances = 32;
  uint64_t seed = 0;
  int64_t ctx_size = 0;  // longest prompt; 0: the model's max_position
  int64_t chunk_size = kChunkSize;
  std::function<void(int64_t done, int64_t total)> progress;  // tokens, after each forward pass; may throw
  int64_t kv_memory = 0;                                      // most bytes of keys and values; 0: as many as are needed
};

struct PasskeyCell {
  int64_t length = 0;
  double depth = 0;
  int64_t distance = 0;  // the mean over trials, in whole tokens
  int64_t trials = 0, correct = 0;
  double logprob = 0;  // natural log-probability of a digit, the mean over digits and trials
};

struct PasskeyReport {
  PasskeyStyle style;
  int64_t digits;
  std::vector<PasskeyCell> cells;      // length by length, depth by depth
  std::vector<PasskeyCell> distances;  // rising
  int64_t k_max = 0;                   // of these, or of the cells
};
// The largest distance k such that at k and at every smaller one at least a fifth of the keys is found; 0: none.
int64_t k_max(std::vector<PasskeyCell> cells);

// Throws std::invalid_argument for an option out of range or a length without room; needs no model.
void check_passkey(const Config& config, const Tokenizer& tokenizer, const PasskeyOptions& options);

// Greedy answers of digits + 5 tokens, 10 at least. Throws what check_passkey() throws, OutOfMemory when the key/value
// cache does not fit, std::runtime_error when logits are NaN.
PasskeyReport passkey(MixtralImpl& model, const Tokenizer& tokenizer, const PasskeyOptions& options);
nlohmann::json to_json(const PasskeyReport& report, const Config& config);

struct Interval {
  double low, high;
};
// Of a share, at 95 % (Wilson, 1927).
Interval wilson_interval(int64_t successes, int64_t trials);

}  // namespace mixtral
