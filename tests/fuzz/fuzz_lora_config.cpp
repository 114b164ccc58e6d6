// The input is an adapter_config.json and, after "----", a module that its patterns may fit.
#include "checkpoint/lora_config.h"
#include "fuzz.h"

using namespace mixtral;

void fuzz(std::string_view input) {
  fuzzing::write("adapter_config.json", fuzzing::take_part(input));
  fuzzing::write("adapter_model.safetensors", "");
  read_lora_config(fuzzing::folder()).scale(std::string(input), 8);
}
