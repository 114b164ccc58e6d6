// What the weight files say about the model, where the configuration says otherwise or nothing.
#pragma once

#include <string>
#include <vector>

#include "../io/tensor_file.h"
#include "../model/config.h"
#include "load_options.h"

namespace mixtral {

// Sets `config` to what the files hold: the float type of most of their bytes, unless the configuration says one; the
// number of rows of the embeddings and the lm_head as vocab_size; an lm_head of its own where tie_word_embeddings is
// set. `warn` hears of the last two, with `source`, the configuration file, in front. Does nothing without files.
void correct_by_contents(Config& config, bool dtype_is_said, const std::vector<TensorFile>& files,
                         const std::string& source, const Warn& warn);

}  // namespace mixtral
