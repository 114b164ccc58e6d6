// The log-probabilities of a window of a text.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace mixtral {

class MixtralImpl;

// ids [n] -> natural-log probabilities of the last `targets` of them, each given all before it. The first of ids has
// the position `first_position`. `after_chunk` gets the number of inputs of each forward pass, and may throw to end the
// work. Throws OutOfMemory when the key/value cache does not fit `kv_memory` bytes (0: any number) or the
// device, std::runtime_error when logits are NaN.
std::vector<double> window_logprobs(MixtralImpl& model, const std::vector<int64_t>& ids, int64_t targets,
                                    int64_t first_position, int64_t chunk_size, int64_t kv_memory,
                                    const std::function<void(int64_t inputs)>& after_chunk);

}  // namespace mixtral
