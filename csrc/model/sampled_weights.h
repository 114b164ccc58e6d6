// A number that tells models apart by their weights, whatever the ranks that hold them.
#pragma once

#include <cstdint>

namespace mixtral {

class MixtralImpl;

// Of some rows of each parameter, those that this rank holds and no rank before it: the sum over the ranks of a model
// is the same in every layout. Of int8 and fp8 without the down projections, whose values depend on the layout.
uint64_t sampled_weights(const MixtralImpl& model);

}  // namespace mixtral
