// The input is a config.json, and a params.json.
#include "checkpoint/config_reader.h"
#include "fuzz.h"

using namespace mixtral;

void fuzz(std::string_view input) {
  for (const CheckpointLayout layout : {CheckpointLayout::kHuggingFace, CheckpointLayout::kConsolidated}) {
    try {
      const Config config = parse_config(std::string(input), layout, "config.json");
      fuzzing::check(config.active_parameters() > 0, "an active parameter");
      fuzzing::check(config.active_parameters() <= config.total_parameters(), "active parameters are parameters");
      fuzzing::check(config.kv_bytes_per_token(4) > 0, "a cache");
    } catch (const LoadError&) {
    }
  }
}
