// What a tokenizer file holds, whichever kind of file it was.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "added_tokens.h"

namespace mixtral {

// Of a file. Loading this many takes less than 64 MiB beside the file.
inline constexpr int64_t kMaxTokens = 1 << 18;
inline constexpr size_t kMaxPieceBytes = 1024;

inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, which stands for a space in pieces

// 1 to 6: the values of `SentencePiece.Type` in sentencepiece_model.proto. kNone: an id without a piece. kAdded: text
// that is a token of its own and no part of the vocabulary that text is merged from.
enum class PieceType { kNone = 0, kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6, kAdded = 7 };

struct SentencePiece {
  std::string text;
  float score = 0;
  PieceType type = PieceType::kNormal;
};

struct Merge {
  int32_t left, right, result;  // ids
};

// Where a text gets the mark U+2581 of a space in front of it. Added tokens cut a text into parts.
enum class SpacePrefix {
  kNever,
  kFirst,             // the first part
  kEvery,             // every part
  kFirstUnlessThere,  // the first part, unless it starts with a space
  kEveryUnlessThere,
};

struct Vocabulary {
  std::vector<SentencePiece> pieces;  // index = token id
  std::string unknown_surface;        // the text of the unknown token
  bool ranked = false;                // text is merged by `merges`, the first one first; else by the pieces' scores
  std::vector<Merge> merges;
  SpacePrefix prefix = SpacePrefix::kEvery;
  bool normalizes = false;        // spaces become U+2581 before added tokens with `normalized` are looked for
  bool splits_at_spaces = false;  // no merge goes across a space
  std::vector<AddedToken> added;
};

// The value of a byte piece "<0x0A>", -1 for any other text.
int byte_value(std::string_view piece);

}  // namespace mixtral
