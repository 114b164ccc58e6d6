// Reads a SentencePiece model file and refuses everything a Mistral tokenizer does not need.
//
// The file is untrusted and the sentencepiece library is known to fail on hostile ones, above all in the code that
// compiles a normalisation trie. So the file is read here first, and the library only sees a file that passed: BPE,
// identity normalisation, byte fallback, a sound vocabulary.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mixtral {

// Values of `SentencePiece.Type` in sentencepiece_model.proto.
enum class PieceType { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6 };

struct SentencePiece {
  std::string text;
  float score = 0;
  PieceType type = PieceType::kNormal;
};

struct SentencePieceFile {
  std::vector<SentencePiece> pieces;  // index = token id
  std::string unknown_surface;        // the text of the unknown token
};

// `file` names the model in errors. Throws LoadError.
SentencePieceFile parse_sentencepiece_file(std::string_view bytes, const std::string& file);

// The value of a byte piece "<0x0A>", -1 for any other text.
int byte_value(std::string_view piece);

}  // namespace mixtral
