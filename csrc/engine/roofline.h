// How fast decoding could be: each step reads weights, and memory is only so fast.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "../checkpoint/expert_offload.h"
#include "../model/config.h"
#include "../model/weight_type.h"

namespace mixtral {

// Bytes of weights that decoding reads per token, on average, with `batch` sequences in a step. A step reads every
// shared weight once, and the experts that at least one of its tokens is routed to: E (1 - (1 - K/E)^B) of them if
// routing is even. Of the embedding it reads single rows, unless lm_head is the same tensor.
double weight_bytes_per_token(const Config& config, int64_t batch, double bytes_per_weight);

// Measures the bytes per second of summing a buffer of this size (up to 1 GiB), so that a model that fits a CPU cache
// is compared with that cache. `check` is called between the runs and may throw to end them.
double read_bandwidth(double bytes, const std::string& device, const std::function<void()>& check);

// Experts of one layer to measure with, on the CPU, in memory that was touched: so many that the choices of a token are
// a part of them, of about `most_bytes`, and at least those of one token. A dense block counts as one expert. Throws
// OutOfMemory.
ExpertWeights sample_experts(const Config& config, const WeightType& type, double most_bytes);

// Measures the bytes per second at which the experts of one token are read and multiplied: with weights of this type,
// of up to 512 MiB and about `most_bytes`. Kernels are slower than a sum, and some types far more than others.
double product_bandwidth(const Config& config, const WeightType& type, double most_bytes,
                         const std::function<void()>& check);

}  // namespace mixtral
