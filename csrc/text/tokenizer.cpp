#include "tokenizer.h"

#include <array>
#include <fstream>
#include <stdexcept>
#include <unordered_map>

#include "../io/load_error.h"
#include "../io/utf8.h"
#include "sentencepiece_file.h"

#ifdef MIXTRAL_WITH_SENTENCEPIECE
#include <sentencepiece_processor.h>
#endif

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxFileBytes = size_t{32} << 20;
constexpr size_t kMaxTextBytes = size_t{1} << 30;          // the library counts in int
constexpr std::string_view kSpace = "\xE2\x96\x81";        // U+2581
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

constexpr std::array<TokenizerVersion, 4> kVersions = {TokenizerVersion::kV1, TokenizerVersion::kV2,
                                                       TokenizerVersion::kV3, TokenizerVersion::kV7};

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// "tokenizer.model.v3" -> v3. An image tokenizer ("....model.v7m1") has the text tokens of its version.
std::optional<TokenizerVersion> version_of_name(const std::string& name) {
  for (const TokenizerVersion version : kVersions) {
    const std::string suffix = ".model." + to_string(version);
    if (ends_with(name, suffix) || ends_with(name, suffix + "m1")) return version;
  }
  return std::nullopt;
}

fs::path find_model_file(const fs::path& path) {
  std::error_code error;
  if (!fs::is_directory(path, error)) return path;
  fs::path best;
  int best_version = -1;
  for (const fs::directory_entry& entry : fs::directory_iterator(path, error)) {
    const std::string name = entry.path().filename().string();
    const std::optional<TokenizerVersion> version = version_of_name(name);
    if (!version && name != "tokenizer.model") continue;
    const int number = version ? static_cast<int>(*version) : 0;
    if (number > best_version) {
      best = entry.path();
      best_version = number;
    }
  }
  if (best.empty()) throw LoadError(path.string(), "", "no tokenizer.model in this folder");
  return best;
}

std::string read_model_file(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) throw LoadError(path.string(), "", "not a file");  // a pipe would block
  const auto size = fs::file_size(path, error);
  if (error) throw LoadError(path.string(), "", "cannot be read");
  if (size == 0) throw LoadError(path.string(), "", "is empty");
  if (size > kMaxFileBytes) throw LoadError(path.string(), "", "must have at most 32 MiB");
  std::string bytes(size, '\0');
  std::ifstream stream(path, std::ios::binary);
  if (!stream.read(bytes.data(), static_cast<std::streamsize>(size))) {
    throw LoadError(path.string(), "", "cannot be read");
  }
  return bytes;
}

}  // namespace

std::string to_string(TokenizerVersion version) { return "v" + std::to_string(static_cast<int>(version)); }

TokenizerVersion parse_tokenizer_version(std::string_view name) {
  for (const TokenizerVersion version : kVersions) {
    if (name == to_string(version)) return version;
  }
  throw std::invalid_argument("tokenizer: version must be v1, v2, v3 or v7, got " + std::string(name));
}

struct Tokenizer::Impl {
  std::vector<SentencePiece> pieces;
  std::string unknown_surface;
  std::unordered_map<std::string_view, int64_t> control_ids;  // keys point into `pieces`
  std::array<int64_t, 256> byte_ids{};
  int64_t bos_id = 0;
  int64_t eos_id = 0;
  TokenizerVersion version = TokenizerVersion::kV1;
#ifdef MIXTRAL_WITH_SENTENCEPIECE
  sentencepiece::SentencePieceProcessor processor;
#endif

  Impl(const fs::path& path, std::optional<TokenizerVersion> wanted) {
    const std::string bytes = read_model_file(path);
    SentencePieceFile model = parse_sentencepiece_file(bytes, path.string());
    pieces = std::move(model.pieces);
    unknown_surface = std::move(model.unknown_surface);
    for (size_t id = 0; id < pieces.size(); ++id) {
      const SentencePiece& piece = pieces[id];
      if (piece.type == PieceType::kControl) control_ids[piece.text] = static_cast<int64_t>(id);
      if (piece.type == PieceType::kByte) byte_ids[byte_value(piece.text)] = static_cast<int64_t>(id);
    }
    bos_id = require_control("<s>", path);
    eos_id = require_control("</s>", path);
    version = wanted ? *wanted : version_of_name(path.filename().string()).value_or(version_of_content());
    if (version != TokenizerVersion::kV1) {
      require_control("[INST]", path);
      require_control("[/INST]", path);
    }
    if (version == TokenizerVersion::kV7) {
      require_control("[SYSTEM_PROMPT]", path);
      require_control("[/SYSTEM_PROMPT]", path);
    }
    load_processor(bytes, path);
  }

  int64_t require_control(const std::string& piece, const fs::path& path) const {
    const auto found = control_ids.find(piece);
    if (found == control_ids.end()) throw LoadError(path.string(), piece, "control token is missing");
    return found->second;
  }

  // All versions have the same control ids, and name the unused ones "[control_8]". So the names identify the version.
  TokenizerVersion version_of_content() const {
    if (control_ids.count("[SYSTEM_PROMPT]")) return TokenizerVersion::kV7;
    if (control_ids.count("[IMG]")) return TokenizerVersion::kV3;
    if (control_ids.count("[INST]")) return TokenizerVersion::kV2;
    return TokenizerVersion::kV1;
  }

  const SentencePiece& at(int64_t id) const {
    if (id < 0 || id >= static_cast<int64_t>(pieces.size())) {
      throw std::out_of_range("tokenizer: id must be in [0, " + std::to_string(pieces.size()) + "), got " +
                              std::to_string(id));
    }
    return pieces[static_cast<size_t>(id)];
  }

#ifdef MIXTRAL_WITH_SENTENCEPIECE
  void load_processor(const std::string& bytes, const fs::path& path) {
    const auto status = processor.LoadFromSerializedProto(bytes);
    if (!status.ok()) throw LoadError(path.string(), "", "refused by sentencepiece");
    // Ids are used as indices, so the library must have read the same vocabulary that was checked above.
    if (processor.GetPieceSize() != static_cast<int>(pieces.size())) {
      throw LoadError(path.string(), "", "sentencepiece reads another vocabulary");
    }
  }

  std::vector<int> encode_valid(std::string_view text) const {
    std::vector<int> ids;
    const auto status = processor.Encode(text, &ids);
    if (!status.ok()) throw std::runtime_error("tokenizer: " + status.ToString());
    return ids;
  }

  // The library turns each invalid byte into U+FFFD and gives the place of every piece in the text. So those pieces go
  // back to the bytes that the text has there.
  std::vector<int> encode_invalid(std::string_view text) const {
    std::vector<bool> invalid(text.size() + 1, false);
    for (size_t i = 0; i < text.size();) {
      const Utf8Prefix prefix = utf8_prefix(text.substr(i));
      const bool whole = prefix.kind == Utf8Prefix::kWhole;
      invalid[i] = !whole;
      i += whole ? prefix.length : 1;
    }
    std::vector<int> ids;
    const auto encoded = processor.EncodeAsImmutableProto(text);  // the pieces point into it
    for (const auto& piece : encoded.pieces()) {
      const size_t begin = piece.begin(), end = piece.end();
      // U+FFFD without a piece becomes three byte pieces: the last one covers the invalid byte, the others nothing.
      bool replaced = begin == end && invalid[begin] && at(piece.id()).type == PieceType::kByte;
      for (size_t i = begin; i < end; ++i) replaced = replaced || invalid[i];
      if (!replaced) ids.push_back(static_cast<int>(piece.id()));
      for (size_t i = begin; replaced && i < end; ++i) {
        ids.push_back(static_cast<int>(byte_ids[static_cast<unsigned char>(text[i])]));
      }
    }
    return ids;
  }
#else
  void load_processor(const std::string&, const fs::path&) {
    throw std::runtime_error("tokenizer: built without sentencepiece: text is not available, use token ids");
  }
  std::vector<int> encode_valid(std::string_view) const { return {}; }
  std::vector<int> encode_invalid(std::string_view) const { return {}; }
#endif
};

bool Tokenizer::available() {
#ifdef MIXTRAL_WITH_SENTENCEPIECE
  return true;
#else
  return false;
#endif
}

Tokenizer::Tokenizer(const fs::path& path, std::optional<TokenizerVersion> version)
    : impl_(std::make_shared<const Impl>(find_model_file(path), version)) {}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool add_bos, bool add_eos) const {
  if (text.size() > kMaxTextBytes) {
    throw std::length_error("tokenizer: text must have at most 2^30 bytes, got " + std::to_string(text.size()));
  }
  const std::vector<int> text_ids = is_valid_utf8(text) ? impl_->encode_valid(text) : impl_->encode_invalid(text);
  std::vector<int64_t> ids;
  ids.reserve(text_ids.size() + 2);
  if (add_bos) ids.push_back(bos_id());
  ids.insert(ids.end(), text_ids.begin(), text_ids.end());
  if (add_eos) ids.push_back(eos_id());
  return ids;
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids) const {
  StreamingDecoder decoder(*this);
  std::string text;
  for (const int64_t id : ids) text += decoder.push(id);
  return text + decoder.flush();
}

std::string Tokenizer::piece(int64_t id) const { return impl_->at(id).text; }
bool Tokenizer::is_control(int64_t id) const { return impl_->at(id).type == PieceType::kControl; }
bool Tokenizer::is_byte(int64_t id) const { return impl_->at(id).type == PieceType::kByte; }

std::optional<int64_t> Tokenizer::control_id(std::string_view piece) const {
  const auto found = impl_->control_ids.find(piece);
  return found == impl_->control_ids.end() ? std::nullopt : std::optional<int64_t>(found->second);
}

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(impl_->pieces.size()); }
int64_t Tokenizer::bos_id() const { return impl_->bos_id; }
int64_t Tokenizer::eos_id() const { return impl_->eos_id; }
TokenizerVersion Tokenizer::version() const { return impl_->version; }

std::string StreamingDecoder::push(int64_t id) {
  const SentencePiece& piece = tokenizer_.impl_->at(id);
  if (piece.type == PieceType::kByte) {
    at_start_ = false;
    pending_ += static_cast<char>(byte_value(piece.text));
    return take_pending(/*wait_for_more=*/true);
  }
  std::string text = flush();
  if (piece.type == PieceType::kControl) return text;
  std::string_view rest = piece.type == PieceType::kUnknown ? tokenizer_.impl_->unknown_surface : piece.text;
  if (at_start_ && rest.substr(0, kSpace.size()) == kSpace) rest.remove_prefix(kSpace.size());
  at_start_ = false;
  for (size_t space; (space = rest.find(kSpace)) != rest.npos; rest.remove_prefix(space + kSpace.size())) {
    text.append(rest.substr(0, space)) += ' ';
  }
  return text.append(rest);
}

std::string StreamingDecoder::flush() { return take_pending(/*wait_for_more=*/false); }

std::string StreamingDecoder::take_pending(bool wait_for_more) {
  std::string text;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Prefix prefix = utf8_prefix(rest);
    if (prefix.kind == Utf8Prefix::kCut && wait_for_more) break;
    const bool whole = prefix.kind == Utf8Prefix::kWhole;
    text.append(whole ? rest.substr(0, prefix.length) : kReplacement);
    rest.remove_prefix(whole ? prefix.length : 1);
  }
  pending_.erase(0, pending_.size() - rest.size());
  return text;
}

}  // namespace mixtral
