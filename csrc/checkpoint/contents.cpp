#include "contents.h"

#include <algorithm>
#include <map>

namespace mixtral {
namespace {

struct Found {
  const TensorFile* file = nullptr;
  const TensorEntry* entry = nullptr;
};

Found find(const std::vector<TensorFile>& files, const std::string& tensor) {
  for (const TensorFile& file : files) {
    const auto found = file.entries().find(tensor);
    if (found != file.entries().end()) return {&file, &found->second};
  }
  return {};
}

bool same_bytes(const Found& a, const Found& b) {
  constexpr uint64_t kStep = 1 << 20;
  const uint64_t bytes = a.entry->end - a.entry->begin;
  std::string left(std::min(bytes, kStep), '\0'), right = left;
  for (uint64_t at = 0; at < bytes; at += kStep) {
    const uint64_t count = std::min(kStep, bytes - at);
    a.file->read(a.entry->begin + at, left.data(), count);
    b.file->read(b.entry->begin + at, right.data(), count);
    if (left != right) return false;
  }
  return true;
}

// The float type of most of the bytes: "float32", "bfloat16" or "float16"; empty when there is none.
std::string dtype_of(const std::vector<TensorFile>& files) {
  std::map<std::string, uint64_t> bytes = {{"F32", 0}, {"BF16", 0}, {"F16", 0}};
  for (const TensorFile& file : files) {
    for (const auto& [name, entry] : file.entries()) {
      const auto counted = bytes.find(entry.dtype);
      if (counted != bytes.end()) counted->second += entry.end - entry.begin;
    }
  }
  const auto most =
      std::max_element(bytes.begin(), bytes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  if (most->second == 0) return "";
  return most->first == "F32" ? "float32" : most->first == "BF16" ? "bfloat16" : "float16";
}

bool differ(const Found& head, const Found& embeddings) {
  const bool alike = head.entry->dtype == embeddings.entry->dtype && head.entry->shape == embeddings.entry->shape;
  return !alike || !same_bytes(head, embeddings);
}

}  // namespace

void correct_by_contents(Config& config, bool dtype_is_said, const std::vector<TensorFile>& files,
                         const std::string& source, const Warn& warn) {
  const std::string dtype = dtype_of(files);
  if (!dtype_is_said && !dtype.empty()) config.dtype = dtype;
  const bool hugging_face = config.layout == CheckpointLayout::kHuggingFace;
  const Found head = find(files, hugging_face ? "lm_head.weight" : "output.weight");
  const Found embeddings = find(files, hugging_face ? "model.embed_tokens.weight" : "tok_embeddings.weight");
  if (!embeddings.entry || embeddings.entry->shape.size() != 2) return;
  const int64_t rows = embeddings.entry->shape[0];
  const bool agree = !head.entry || head.entry->shape == embeddings.entry->shape;
  if (rows != config.vocab_size && rows > 0 && agree) {
    if (warn) {
      warn(source + ": vocab_size is " + std::to_string(config.vocab_size) + ", but the files hold " +
           std::to_string(rows) + " embeddings, which are used");
    }
    config.vocab_size = rows;
  }
  if (config.tie_word_embeddings && head.entry && differ(head, embeddings)) {
    if (warn)
      warn(source + ": tie_word_embeddings: the files hold another lm_head than the embeddings, and it is used");
    config.tie_word_embeddings = false;
  }
}

}  // namespace mixtral
