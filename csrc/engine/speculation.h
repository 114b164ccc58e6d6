// Prompt-lookup speculation: text that repeats is guessed from its first occurrence, and a pass checks several guessed
// tokens at once (Saxena, "Prompt Lookup Decoding", 2023).
//
// Every guessed position is sampled as if there were no guess, and the guess holds if it is the token that was picked.
// So tokens and logprobs are those without speculation, at any temperature, bit for bit where the bits of a token do
// not depend on the batch (docs/numerics.md); only the speed differs.
//
// A pass with guesses takes longer: a guessed token wakes experts that the others do not need. So each sequence has a
// gate, which closes where guessing does not pay (Saxena et al., "Utility-Driven Speculative Decoding for
// Mixture-of-Experts", 2025).
#pragma once

#include <cstdint>
#include <vector>

namespace mixtral {

// At most `most` tokens that may follow `ids`: those behind the last earlier occurrence of the newest four tokens, or
// else three, or two. Where they reach the end of `ids` they go on as the guess itself does.
std::vector<int64_t> look_up(const std::vector<int64_t>& ids, int64_t most);

// Whether guessing pays for one sequence.
class DraftGate {
 public:
  // Once per pass that could carry a guess: how many tokens to guess, of at most `most`. A few while it is unknown
  // whether that pays, and now and then when it did not.
  int64_t open(int64_t most);
  // After a pass with a guess. gain: the tokens that it gave, over how many times as long it took as one without.
  void learn(double gain);

 private:
  double gain_ = 1;   // moving average
  int64_t wait_ = 0;  // passes
};

}  // namespace mixtral
