// What the weight files say about the model, where the configuration says otherwise or nothing.
#pragma once

#include <string>
#include <vector>

#include "../io/tensor_file.h"
#include "../model/config.h"

namespace mixtral {

// The float type of most of their bytes: "float32", "bfloat16" or "float16"; empty when they hold none of these.
std::string dtype_of(const std::vector<TensorFile>& files);

// Whether they hold an lm_head whose values are not those of the embeddings.
bool has_own_lm_head(const std::vector<TensorFile>& files, CheckpointLayout layout);

}  // namespace mixtral
