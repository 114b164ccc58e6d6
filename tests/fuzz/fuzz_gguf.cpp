// The input is a GGUF file: its tensors, its configuration, its tokenizer, whichever of these loads.
#include "checkpoint/gguf_config.h"
#include "fuzz.h"
#include "io/ggml_type.h"
#include "io/gguf.h"
#include "text/gguf_tokenizer.h"
#include "text/sentencepiece_file.h"
#include "text/sentencepiece_writer.h"

using namespace mixtral;

namespace {

void read_tensors(const TensorFile& file, uint64_t file_bytes) {
  for (const auto& [name, entry] : file.entries()) {
    fuzzing::check(entry.begin <= entry.end && entry.end <= file_bytes, "tensors lie in the file");
    std::string data(entry.end - entry.begin, '\0');
    file.read(entry.begin, data.data(), data.size());
    if (!is_ggml_quantized(entry.dtype)) continue;
    size_t count = 1;
    for (const int64_t size : entry.shape) count *= static_cast<size_t>(size);
    fuzzing::check(count <= 2 * data.size(), "blocks are smaller than their numbers");
    std::string floats(count * sizeof(float), '\0');
    dequantize_ggml(entry.dtype, reinterpret_cast<const uint8_t*>(data.data()), static_cast<int64_t>(count),
                    reinterpret_cast<float*>(floats.data()));
  }
}

void read_config(const std::filesystem::path& path) {
  try {
    read_gguf_config(path);
  } catch (const LoadError&) {  // a file without one may have a tokenizer
  }
}

}  // namespace

void fuzz(std::string_view input) {
  const std::filesystem::path path = fuzzing::write("m.gguf", input);
  read_tensors(open_gguf(path).tensors, input.size());
  read_config(path);
  const Vocabulary vocabulary = read_gguf_tokenizer(path);
  const auto written = parse_sentencepiece_file(sentencepiece_bytes(vocabulary, "m.gguf"), "tokenizer.model");
  for (size_t id = 0; id < written.pieces.size(); ++id) {
    fuzzing::check(written.pieces[id].text == vocabulary.pieces[id].text, "pieces come back");
  }
}
