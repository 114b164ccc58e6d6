// The element types of GGUF files: their sizes, and the way from blocks of quantised numbers to floats.
#pragma once

#include <cstdint>
#include <string>

namespace mixtral {

struct GgmlType {
  uint32_t id;  // in the file
  const char* name;
  int64_t elements;  // of a block, which is a run of the last dimension
  uint64_t bytes;    // of a block
};

// nullptr: no such type.
const GgmlType* find_ggml_type(uint32_t id);

// Whether `name` is one of the quantised types that dequantize() reads: Q4_0, Q8_0, Q4_K, Q5_K and Q6_K.
bool is_ggml_quantized(const std::string& name);
// Elements of a block of the type `name`; 1 when it is none of those.
int64_t ggml_block_size(const std::string& name);

// `count` elements in whole blocks of the type `name`, to the floats that llama.cpp computes from them, bit by bit.
void dequantize_ggml(const std::string& name, const uint8_t* blocks, int64_t count, float* out);

}  // namespace mixtral
