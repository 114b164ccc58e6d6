// The input is a trace of the routing; one that loads is the same when it has been written and read again.
#include <algorithm>

#include "engine/trace_file.h"
#include "fuzz.h"

using namespace mixtral;

void fuzz(std::string_view input) {
  const Trace trace = read_trace(fuzzing::write("trace.safetensors", input));
  const Routing& routing = trace.routing;
  fuzzing::check(trace.tokens() > 0 && routing.tokens() == trace.tokens(), "experts for every token");
  const uint8_t largest = *std::max_element(routing.topk_ids.begin(), routing.topk_ids.end());
  fuzzing::check(largest < routing.experts, "experts that the model has");
  write_trace(trace, fuzzing::folder() / "again.safetensors");
  const Trace again = read_trace(fuzzing::folder() / "again.safetensors");
  fuzzing::check(again.token_id == trace.token_id && again.routing.topk_ids == routing.topk_ids &&
                     again.routing.router_logits == routing.router_logits && again.domains == trace.domains,
                 "what was written");
}
