// The input is a file of torch.save; of one that loads, every byte of every tensor can be read.
#include "fuzz.h"
#include "io/torch_pickle.h"

using namespace mixtral;

void fuzz(std::string_view input) {
  const TensorFile file = open_torch_pickle(fuzzing::write("m.bin", input));
  for (const auto& [name, entry] : file.entries()) {
    fuzzing::check(entry.begin <= entry.end && entry.end <= input.size(), "tensors lie in the file");
    std::string data(entry.end - entry.begin, '\0');
    file.read(entry.begin, data.data(), data.size());
  }
}
