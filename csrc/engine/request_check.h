// What a request must be for the engine to take it.
#pragma once

#include <cstdint>

#include "../model/transformer.h"
#include "request.h"

namespace mixtral {

// Throws std::invalid_argument, as Engine::submit() says. Whether request.replay is of this model is not checked.
void check_request(const Request& request, const MixtralImpl& model, int64_t ctx_size, bool has_tokenizer);

}  // namespace mixtral
