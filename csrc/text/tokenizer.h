// SentencePiece BPE tokenizer of the Mistral family, and decoding as a stream.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mixtral {

// Which control tokens and chat format the tokenizer has (mistral-common's names).
//   v1: Mixtral 8x7B, Mistral 7B v0.1 and v0.2: "[INST]" is plain text
//   v2: Mistral 7B v0.3: control tokens for [INST] and tools
//   v3: Mixtral 8x22B: other tool messages; the same chat
//   v7: control tokens around the system prompt
enum class TokenizerVersion { kV1 = 1, kV2 = 2, kV3 = 3, kV7 = 7 };

std::string to_string(TokenizerVersion version);  // "v1"
// Takes "v1", "v2", "v3" and "v7"; throws std::invalid_argument.
TokenizerVersion parse_tokenizer_version(std::string_view name);

class Tokenizer {
 public:
  // False when the library was built without sentencepiece: then no Tokenizer can be made.
  static bool available();

  // `path`: a tokenizer.model file, or a folder that holds one (tokenizer.model.v3 goes before tokenizer.model).
  // Without `version` it is read from the file name ("tokenizer.model.v3"), else from the control tokens in the file.
  // Throws LoadError when the file is not a valid BPE SentencePiece model.
  explicit Tokenizer(const std::filesystem::path& path, std::optional<TokenizerVersion> version = std::nullopt);

  // Text only: "[INST]" or "</s>" in it stays text. Invalid UTF-8 is encoded byte by byte. decode() gives valid UTF-8
  // back unchanged, but for "▁" (U+2581), which stands for a space in every SentencePiece vocabulary.
  std::vector<int64_t> encode(std::string_view text, bool add_bos = false, bool add_eos = false) const;
  // Always valid UTF-8: U+FFFD for each byte that belongs to no code point. Control tokens decode to nothing, and the
  // space that encode() puts before the text is dropped. Throws std::out_of_range for an id outside [0, vocab_size).
  std::string decode(const std::vector<int64_t>& ids) const;
  // The piece as stored: "▁the", "<0x0A>", "[INST]".
  std::string piece(int64_t id) const;
  bool is_control(int64_t id) const;
  bool is_byte(int64_t id) const;
  // The id of the control token of this name, such as "[INST]".
  std::optional<int64_t> control_id(std::string_view piece) const;

  int64_t vocab_size() const;
  int64_t bos_id() const;
  int64_t eos_id() const;
  TokenizerVersion version() const;

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
