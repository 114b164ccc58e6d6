// The input is a safetensors file; of one that loads, every byte of every tensor can be read.
#include "fuzz.h"
#include "io/safetensors.h"

using namespace mixtral;

void fuzz(std::string_view input) {
  const TensorFile file = open_safetensors(fuzzing::write("m.safetensors", input));
  uint64_t bytes = 0;
  for (const auto& [name, entry] : file.entries()) {
    std::string data(entry.end - entry.begin, '\0');
    file.read(entry.begin, data.data(), data.size());
    bytes += data.size();
  }
  fuzzing::check(bytes < input.size(), "tensors do not overlap");
}
