#include "safetensors_writer.h"

#include <nlohmann/json.hpp>

namespace mixtral {

std::string safetensors_header(const std::vector<StoredTensor>& tensors,
                               const std::map<std::string, std::string>& metadata, uint64_t alignment) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};  // which other programs look for
  for (const auto& [key, value] : metadata) header["__metadata__"][key] = value;
  uint64_t offset = 0;
  for (const StoredTensor& tensor : tensors) {
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + tensor.bytes}}};
    offset += tensor.bytes;
  }
  std::string text = header.dump();
  const uint64_t data_begin = sizeof(uint64_t) + text.size();
  text.append((alignment - data_begin % alignment) % alignment, ' ');
  std::string prefix;
  for (int i = 0; i < 8; ++i) prefix += static_cast<char>(text.size() >> (8 * i) & 0xff);
  return prefix + text;
}

}  // namespace mixtral
