// Better roundings for int4 than the nearest ones: those that change the results of a text least (Frantar et al.,
// "GPTQ", 2022).
//
// A matrix W [N,K] is used in x W^T. For the inputs x that a text gives it, with the Gram matrix G = sum of x^T x,
// the squared error of the results is the trace of (W - Q) G (W - Q)^T. One column of Q after the other is rounded, and
// the columns still to come make up for its error as well as they can. Each matrix sees the inputs that the matrices
// before it give after their own rounding; an expert, those of the tokens routed to it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "load_options.h"

namespace at {
class Tensor;
}

namespace mixtral {

class MixtralImpl;

// Rounds all packed matrices of the int4 `model` anew, from the weights in folder `source` and a text, ids [n] without
// BOS; an expert that no token reaches keeps the nearest. `lora`: the adapter that was merged into the model, if any.
// The text is read in one forward pass, in sequences of at most 2048 tokens behind a BOS. `progress` counts matrices
// and may throw. Throws std::invalid_argument for another model or one that is split over ranks, a source that is
// quantised itself, no ids, or one outside the vocabulary; OutOfMemory; std::runtime_error for inputs that are not
// finite.
void calibrate(MixtralImpl& model, const std::filesystem::path& source, int64_t bos, const std::vector<int64_t>& ids,
               const Progress& progress = nullptr, const std::filesystem::path& lora = {});

// inputs [T,K] -> f32 [K,K]
at::Tensor gram_matrix(const at::Tensor& inputs);
// rows f32 [N,K], gram f32 [K,K], not all zero -> [N/32,...]: the blocks of a packed int4 parameter.
at::Tensor pack_rows_calibrated(const at::Tensor& rows, const at::Tensor& gram);

}  // namespace mixtral
