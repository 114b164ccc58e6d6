// Traces of several requests as one. No torch in here.
#pragma once

#include "trace.h"

namespace mixtral {

// Adds the tokens of `from` as one more document. Throws std::invalid_argument unless both have the same sizes, and
// neither router logits.
void append_document(Trace& to, const Trace& from);

}  // namespace mixtral
