#include "sentencepiece_file.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_set>

#include "../io/load_error.h"
#include "../io/utf8.h"

namespace mixtral {
namespace {

constexpr uint64_t kBpe = 2;  // TrainerSpec.ModelType

// One field of a protobuf message.
struct Field {
  uint32_t number = 0;
  uint32_t wire_type = 0;
  uint64_t value = 0;      // wire types 0 (varint), 1 (64 bits) and 5 (32 bits)
  std::string_view bytes;  // wire type 2
};

// Walks the fields of one protobuf message; sub-messages are walked by a reader of their own.
class WireReader {
 public:
  WireReader(std::string_view bytes, const std::string& file) : rest_(bytes), file_(file) {}

  bool next(Field& field) {
    if (rest_.empty()) return false;
    const uint64_t tag = varint();
    field = Field{};
    field.number = static_cast<uint32_t>(tag >> 3);
    field.wire_type = static_cast<uint32_t>(tag & 7);
    if (tag >> 32 != 0 || field.number == 0) fail("field number must be 1 to 2^29 - 1");
    switch (field.wire_type) {
      case 0:
        field.value = varint();
        break;
      case 1:
        field.value = fixed(8);
        break;
      case 2:
        field.bytes = take(varint());
        break;
      case 5:
        field.value = fixed(4);
        break;
      default:
        fail("wire type must be 0, 1, 2 or 5, got " + std::to_string(field.wire_type));
    }
    return true;
  }

  [[noreturn]] void fail(const std::string& reason) const {
    throw LoadError(file_, "", "not a SentencePiece model: " + reason);
  }

 private:
  std::string_view take(uint64_t size) {
    if (size > rest_.size()) {
      fail("a field of " + std::to_string(size) + " bytes where " + std::to_string(rest_.size()) + " are left");
    }
    const std::string_view bytes = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return bytes;
  }

  uint64_t fixed(size_t size) {  // little-endian
    uint64_t value = 0;
    const std::string_view bytes = take(size);
    for (size_t i = 0; i < size; ++i) value |= uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
    return value;
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      if (shift == 63 && byte > 1) break;
      value |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return value;
    }
    fail("a varint of more than 64 bits");
  }

  std::string_view rest_;
  const std::string& file_;
};

// The library treats a known field of the wrong wire type as an unknown one. Its meaning would be a guess.
void expect_wire_type(const WireReader& reader, const Field& field, uint32_t wire_type, const char* name) {
  if (field.wire_type == wire_type) return;
  reader.fail(std::string(name) + " must have wire type " + std::to_string(wire_type) + ", got " +
              std::to_string(field.wire_type));
}

SentencePiece read_piece(std::string_view bytes, const std::string& file, const std::string& item) {
  SentencePiece piece;
  WireReader reader(bytes, file);
  for (Field field; reader.next(field);) {
    if (field.number == 1) {
      expect_wire_type(reader, field, 2, "piece");
      piece.text = field.bytes;
    } else if (field.number == 2) {
      expect_wire_type(reader, field, 5, "score");
      const auto bits = static_cast<uint32_t>(field.value);
      std::memcpy(&piece.score, &bits, sizeof bits);
    } else if (field.number == 3) {
      expect_wire_type(reader, field, 0, "type");
      // 5 is UNUSED: a piece that merges go through but text never shows. Mistral's files have none.
      if (field.value < 1 || field.value > 6 || field.value == 5) {
        throw LoadError(file, item, "type must be 1, 2, 3, 4 or 6, got " + std::to_string(field.value));
      }
      piece.type = static_cast<PieceType>(field.value);
    }
  }
  check_piece(piece, file, item);
  return piece;
}

// The fields of TrainerSpec and NormalizerSpec that change what encode and decode do. The initial values are the
// defaults of sentencepiece_model.proto; a message that occurs twice is merged, as protobuf does.
struct Specs {
  uint64_t model_type = 1;
  bool whitespace_as_suffix = false;
  bool byte_fallback = false;
  std::string unknown_surface = kUnknownSurface;
  std::string normalizer;
  std::string charsmap;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
};

void read_trainer_spec(std::string_view bytes, const std::string& file, Specs& specs) {
  WireReader reader(bytes, file);
  for (Field field; reader.next(field);) {
    if (field.number == 3) {
      expect_wire_type(reader, field, 0, "model_type");
      specs.model_type = field.value;
    } else if (field.number == 24) {
      expect_wire_type(reader, field, 0, "treat_whitespace_as_suffix");
      specs.whitespace_as_suffix = field.value != 0;
    } else if (field.number == 35) {
      expect_wire_type(reader, field, 0, "byte_fallback");
      specs.byte_fallback = field.value != 0;
    } else if (field.number == 44) {
      expect_wire_type(reader, field, 2, "unk_surface");
      specs.unknown_surface = field.bytes;
    }
  }
}

void read_normalizer_spec(std::string_view bytes, const std::string& file, Specs& specs) {
  WireReader reader(bytes, file);
  for (Field field; reader.next(field);) {
    if (field.number == 1 || field.number == 2) {
      expect_wire_type(reader, field, 2, field.number == 1 ? "name" : "precompiled_charsmap");
      (field.number == 1 ? specs.normalizer : specs.charsmap) = field.bytes;
    } else if (field.number >= 3 && field.number <= 5) {
      expect_wire_type(reader, field, 0, "a flag of normalizer_spec");
      bool& flag = field.number == 3   ? specs.add_dummy_prefix
                   : field.number == 4 ? specs.remove_extra_whitespaces
                                       : specs.escape_whitespaces;
      flag = field.value != 0;
    }
  }
}

void check_specs(const Specs& specs, const std::string& file) {
  const auto require = [&](bool ok, const char* item, const std::string& reason) {
    if (!ok) throw LoadError(file, item, reason);
  };
  require(specs.model_type == kBpe, "model_type", "must be 2 (BPE), got " + std::to_string(specs.model_type));
  require(specs.normalizer == "identity", "normalizer_spec", "name must be identity");
  require(specs.charsmap.empty(), "precompiled_charsmap", "must be empty");
  require(specs.byte_fallback, "byte_fallback", "must be true, got false");
  require(specs.add_dummy_prefix, "add_dummy_prefix", "must be true, got false");
  require(!specs.remove_extra_whitespaces, "remove_extra_whitespaces", "must be false, got true");
  require(specs.escape_whitespaces, "escape_whitespaces", "must be true, got false");
  require(!specs.whitespace_as_suffix, "treat_whitespace_as_suffix", "must be false, got true");
  require(is_valid_utf8(specs.unknown_surface), "unk_surface", "must be UTF-8");
}

}  // namespace

int byte_value(std::string_view piece) {
  const std::string_view digits = "0123456789ABCDEF";
  if (piece.size() != 6 || piece.substr(0, 3) != "<0x" || piece[5] != '>') return -1;
  const size_t high = digits.find(piece[3]), low = digits.find(piece[4]);
  return high == digits.npos || low == digits.npos ? -1 : static_cast<int>(16 * high + low);
}

void check_piece(const SentencePiece& piece, const std::string& file, const std::string& item) {
  if (piece.text.empty()) throw LoadError(file, item, "text must not be empty");
  if (piece.text.size() > kMaxPieceBytes) {
    throw LoadError(file, item, "text must have at most 1024 bytes, got " + std::to_string(piece.text.size()));
  }
  if (!is_valid_utf8(piece.text) || piece.text.find('\0') != std::string::npos) {
    throw LoadError(file, item, "text must be UTF-8 without NUL");
  }
  // The SentencePiece library looks a character of the text up among all pieces: it would find a control token.
  if (piece.type == PieceType::kControl && utf8_prefix(piece.text).length == piece.text.size()) {
    throw LoadError(file, item, "a control piece must have more than one character");
  }
  if (!std::isfinite(piece.score)) throw LoadError(file, item, "score must be finite");
  if (piece.type == PieceType::kByte && byte_value(piece.text) < 0) {
    throw LoadError(file, item + " (" + piece.text + ")", "a byte piece must read <0x00> to <0xFF>");
  }
}

void check_vocabulary(const std::vector<SentencePiece>& pieces, const std::string& file) {
  std::unordered_set<std::string_view> seen;
  for (size_t id = 0; id < pieces.size(); ++id) {
    if (pieces[id].type == PieceType::kNone) continue;
    if (!seen.insert(pieces[id].text).second) {
      throw LoadError(file, "piece " + std::to_string(id) + " (" + pieces[id].text + ")", "occurs twice");
    }
  }
  if (seen.empty()) throw LoadError(file, "", "vocabulary must not be empty");
  const auto count = [&](PieceType type) {
    return std::count_if(pieces.begin(), pieces.end(), [=](const SentencePiece& piece) { return piece.type == type; });
  };
  const auto is_space = [](const SentencePiece& piece) {
    return piece.text == "\xE2\x96\x81" && piece.type != PieceType::kUnknown;
  };
  if (std::none_of(pieces.begin(), pieces.end(), is_space)) {
    throw LoadError(file, "", "must have the piece U+2581, which stands for a space");
  }
  const auto unknown = count(PieceType::kUnknown), bytes = count(PieceType::kByte);
  if (unknown != 1) throw LoadError(file, "", "must have one unknown piece, got " + std::to_string(unknown));
  if (bytes != 256) throw LoadError(file, "", "must have 256 byte pieces, got " + std::to_string(bytes));
}

SentencePieceFile parse_sentencepiece_file(std::string_view bytes, const std::string& file) {
  SentencePieceFile model;
  Specs specs, denormalizer;
  WireReader reader(bytes, file);
  for (Field field; reader.next(field);) {
    if (field.number > 5) continue;  // unknown to the library, which skips it
    expect_wire_type(reader, field, 2, "a field of ModelProto");
    if (field.number == 1) {
      if (model.pieces.size() == kMaxTokens) throw LoadError(file, "", "must have at most 2^18 pieces");
      model.pieces.push_back(read_piece(field.bytes, file, "piece " + std::to_string(model.pieces.size())));
    } else if (field.number == 2) {
      read_trainer_spec(field.bytes, file, specs);
    } else if (field.number == 3) {
      read_normalizer_spec(field.bytes, file, specs);
    } else if (field.number == 5) {
      read_normalizer_spec(field.bytes, file, denormalizer);
    }
  }
  check_specs(specs, file);
  if (!denormalizer.charsmap.empty()) throw LoadError(file, "denormalizer_spec", "precompiled_charsmap must be empty");
  check_vocabulary(model.pieces, file);
  model.unknown_surface = specs.unknown_surface;
  return model;
}

}  // namespace mixtral
