#include "gguf_tokenizer.h"

#include <utility>
#include <vector>

#include "../io/gguf.h"
#include "../io/load_error.h"
#include "sentencepiece_file.h"
#include "tokenizer_folder.h"

namespace mixtral {
namespace {

const std::string kPrefix = "tokenizer.ggml.";
constexpr int32_t kUnused = 5;  // fills the vocabulary up to the rows of the embeddings

// The values are those of PieceType.
PieceType piece_type(const GgufFile& file, int32_t type) {
  if (type == kUnused) return PieceType::kNone;
  if (type < 1 || type > 6) {
    throw LoadError(file.tensors.path(), kPrefix + "token_type", "must be 1 to 6, got " + std::to_string(type));
  }
  return static_cast<PieceType>(type);
}

}  // namespace

Vocabulary read_gguf_tokenizer(const std::filesystem::path& path) {
  const GgufFile file = open_gguf(path);
  const std::string model = file.text(kPrefix + "model");
  if (model != "llama") {
    throw LoadError(path.string(), kPrefix + "model", "must be llama (SentencePiece), got " + model.substr(0, 64));
  }
  std::vector<std::string> texts = file.texts(kPrefix + "tokens");
  const std::vector<float> scores = file.numbers(kPrefix + "scores");
  const std::vector<int32_t> types = file.integers(kPrefix + "token_type");
  if (scores.size() != texts.size() || types.size() != texts.size()) {
    throw LoadError(path.string(), kPrefix + "scores", "and token_type must have one value for each token");
  }
  Vocabulary vocabulary;
  for (size_t id = 0; id < texts.size(); ++id) {
    SentencePiece& piece = vocabulary.pieces.emplace_back();
    piece.type = piece_type(file, types[id]);
    if (piece.type == PieceType::kNone) continue;
    piece.text = std::move(texts[id]);
    piece.score = scores[id];
    check_piece(piece, path.string(), "piece " + std::to_string(id));
  }
  check_vocabulary(vocabulary.pieces, path.string());
  vocabulary.unknown_surface = kUnknownSurface;
  const GgufValue* const space = file.find(kPrefix + "add_space_prefix");
  if (space != nullptr && space->kind == GgufValue::kBool && space->integer == 0)
    vocabulary.prefix = SpacePrefix::kNever;
  return vocabulary;
}

std::filesystem::path find_gguf_tokenizer(const std::filesystem::path& folder) {
  const std::filesystem::path tokenizer = find_tokenizer(folder);
  const bool gguf = !tokenizer.empty() && find_gguf(tokenizer) == tokenizer;
  return gguf ? tokenizer : std::filesystem::path();
}

std::optional<std::string> read_gguf_chat_template(const std::filesystem::path& path) {
  const GgufFile file = open_gguf(path);
  const std::string key = "tokenizer.chat_template";
  return file.find(key) != nullptr ? std::make_optional(file.text(key)) : std::nullopt;
}

}  // namespace mixtral
