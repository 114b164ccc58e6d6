// How long decoding takes of a model some of whose experts are on a device, measured before it is loaded.
#pragma once

#include <functional>
#include <string>

#include "../model/config.h"
#include "../model/weight_type.h"

namespace mixtral {

struct OffloadRates {
  bool has_device = false;  // without one `fixed` and `hit` are not known
  double fixed = 0;         // seconds of a token beside its experts
  double hit = 0;           // of a choice whose expert is on the device
  double miss = 0;          // of one whose expert is not: of the CPU, unless the device fetches experts faster
};

// Of tokens one at a time, each after few others: a long context takes longer. device: "cuda", or "cpu" for a simulated
// one (checkpoint/device_arena.h). All of it is computed by the code that decodes: what is beside the experts by an
// engine of a model of these layers, of more than 8 from what 8 and one take, and choices by ExpertOffload, of up to
// 256 MiB of experts. `check` is called between the runs and may throw to end them. Throws OutOfMemory.
OffloadRates measure_offload(const Config& config, const WeightType& type, const std::string& device,
                             const std::function<void()>& check);

}  // namespace mixtral
