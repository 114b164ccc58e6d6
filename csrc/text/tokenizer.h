// SentencePiece BPE tokenizer of the Mistral family, with added tokens, and decoding as a stream.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer_version.h"

namespace mixtral {

class Tokenizer {
 public:
  // Whether the folder has a tokenizer at all.
  static bool in_folder(const std::filesystem::path& folder);

  // `path`: a tokenizer.model or tokenizer.json file, or a folder that holds one. tokenizer.model.v3 goes before
  // tokenizer.model, and that before tokenizer.json; a folder's added tokens come from all its tokenizer files.
  // Without `version` it is read from the file name ("tokenizer.model.v3"), else, or where the name cannot be right,
  // from the control tokens in the file. Throws LoadError when a file is not valid, or no BPE with byte fallback.
  explicit Tokenizer(const std::filesystem::path& path, std::optional<TokenizerVersion> version = std::nullopt);

  // Control tokens written in the text, such as "[INST]" or "</s>", stay text unless `parse_special`; added tokens that
  // are not special are always found. Invalid UTF-8 is encoded byte by byte. decode() gives valid UTF-8 back unchanged,
  // but for "▁" (U+2581), which stands for a space in every SentencePiece vocabulary, and spaces around added tokens.
  std::vector<int64_t> encode(std::string_view text, bool add_bos = false, bool add_eos = false,
                              bool parse_special = false) const;
  // The control tokens that are written in the text, each once: with `parse_special` encode() would find them.
  std::vector<int64_t> special_in(std::string_view text) const;
  // Always valid UTF-8: U+FFFD for each byte that belongs to no code point. Control tokens and ids without a piece
  // decode to nothing, and the space that encode() puts before the text is dropped. Throws std::out_of_range for a
  // negative id, as the functions below do.
  std::string decode(const std::vector<int64_t>& ids) const;
  // The piece as stored: "▁the", "<0x0A>", "[INST]". Empty for an id without one: a model may have more ids.
  std::string piece(int64_t id) const;
  bool is_control(int64_t id) const;
  bool is_byte(int64_t id) const;
  // The id of the control token of this name, such as "[INST]".
  std::optional<int64_t> control_id(std::string_view piece) const;

  int64_t vocab_size() const;  // the greatest id with a piece, plus one
  int64_t bos_id() const;
  int64_t eos_id() const;
  TokenizerVersion version() const;
  // What the files of the folder disagree about, in one line; mostly empty.
  const std::string& note() const;

 private:
  friend class StreamingDecoder;
  struct Impl;
  std::shared_ptr<const Impl> impl_;  // immutable: copies share it
};

// Ids in, text out: never half a code point. The pieces put together equal Tokenizer::decode of all ids.
class StreamingDecoder {
 public:
  // `continues_text`: the ids go on where other text ended, so the first piece keeps its leading space.
  explicit StreamingDecoder(Tokenizer tokenizer, bool continues_text = false)
      : tokenizer_(std::move(tokenizer)), at_start_(!continues_text) {}
  std::string push(int64_t id);  // text completed by this token; may be empty
  std::string flush();           // the rest: U+FFFD for each byte of a cut code point

 private:
  std::string take_pending(bool wait_for_more);

  Tokenizer tokenizer_;
  std::string pending_;  // bytes that may still become a code point
  bool at_start_;
};

}  // namespace mixtral
