#include "sentencepiece_writer.h"

#include <cstring>

#include "../io/load_error.h"

namespace mixtral {
namespace {

// ---- protobuf: a field is its number and wire type in one varint, and its value

std::string varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
  return bytes + static_cast<char>(value);
}

std::string number(uint32_t field, uint64_t value) { return varint(field << 3) + varint(value); }

std::string bytes(uint32_t field, const std::string& value) {
  return varint(field << 3 | 2) + varint(value.size()) + value;
}

std::string f32(uint32_t field, float value) {
  std::string data(sizeof value, '\0');
  std::memcpy(data.data(), &value, sizeof value);
  return varint(field << 3 | 5) + data;
}

}  // namespace

std::string sentencepiece_bytes(const Vocabulary& vocabulary, const std::string& file) {
  size_t count = vocabulary.pieces.size();
  while (count > 0 && vocabulary.pieces[count - 1].type == PieceType::kNone) --count;
  std::string model;
  for (size_t id = 0; id < count; ++id) {
    const SentencePiece& piece = vocabulary.pieces[id];
    if (piece.type == PieceType::kNone) {
      throw LoadError(file, "piece " + std::to_string(id),
                      "is unused between others, which tokenizer.model cannot say");
    }
    model += bytes(1, bytes(1, piece.text) + f32(2, piece.score) + number(3, static_cast<uint64_t>(piece.type)));
  }
  // trainer_spec: BPE, byte_fallback, unk_surface
  model += bytes(2, number(3, 2) + number(4, count) + number(35, 1) + bytes(44, vocabulary.unknown_surface));
  // normalizer_spec: name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
  return model + bytes(3, bytes(1, "identity") + number(3, 1) + number(4, 0) + number(5, 1));
}

}  // namespace mixtral
