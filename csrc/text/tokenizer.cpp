#include "tokenizer.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "../io/load_error.h"
#include "../io/printable.h"
#include "../io/utf8.h"
#include "bpe.h"
#include "tokenizer_folder.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxTextBytes = size_t{1} << 30;
constexpr size_t kMaxNoteBytes = 1024;
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

std::string with_marks(std::string_view text) {
  std::string out;
  out.reserve(text.size() + kSpaceMark.size());
  for (const char c : text) c == ' ' ? out += kSpaceMark : out += c;
  return out;
}

bool starts_with_mark(std::string_view text) { return text.substr(0, kSpaceMark.size()) == kSpaceMark; }

}  // namespace

struct Tokenizer::Impl {
  std::string note;
  std::vector<SentencePiece> pieces;
  std::string unknown_surface;
  SpacePrefix prefix;
  bool splits_at_spaces;
  bool normalizes;
  AddedTokenFinder added;
  AddedTokenFinder normalized_added;  // looked for after those, in normalized text
  AddedTokenFinder all_added;
  Bpe bpe;
  std::unordered_map<std::string_view, int64_t> control_ids;  // keys point into `pieces`
  int64_t bos_id = 0;
  int64_t eos_id = 0;
  TokenizerVersion version = TokenizerVersion::kV1;

  Impl(const fs::path& given, std::optional<TokenizerVersion> wanted) {
    TokenizerFiles files = read_tokenizer(given);
    Vocabulary& vocabulary = files.vocabulary;
    const fs::path& path = files.path;
    note = printable(files.note, kMaxNoteBytes);
    pieces = std::move(vocabulary.pieces);
    unknown_surface = std::move(vocabulary.unknown_surface);
    prefix = vocabulary.prefix;
    splits_at_spaces = vocabulary.splits_at_spaces;
    normalizes = vocabulary.normalizes;
    bpe = Bpe(pieces, vocabulary);
    set_added(vocabulary.added);
    for (size_t id = 0; id < pieces.size(); ++id) {
      if (pieces[id].type == PieceType::kControl) control_ids[pieces[id].text] = static_cast<int64_t>(id);
    }
    bos_id = require_control("<s>", path);
    eos_id = require_control("</s>", path);
    version = wanted ? *wanted : version_of(path.filename().string());
    if (version != TokenizerVersion::kV1) {
      require_control("[INST]", path);
      require_control("[/INST]", path);
    }
    if (version == TokenizerVersion::kV7) {
      require_control("[SYSTEM_PROMPT]", path);
      require_control("[/SYSTEM_PROMPT]", path);
    }
  }

  void set_added(const std::vector<AddedToken>& tokens) {
    std::vector<AddedToken> plain, normalized;
    std::vector<std::string> plain_texts, normalized_texts, texts;
    for (const AddedToken& token : tokens) {
      (token.normalized ? normalized : plain).push_back(token);
      (token.normalized ? normalized_texts : plain_texts)
          .push_back(token.normalized ? normalize(token.text) : token.text);
      texts.push_back(token.text);
    }
    added = AddedTokenFinder(plain, plain_texts);
    normalized_added = AddedTokenFinder(normalized, normalized_texts);
    all_added = AddedTokenFinder(tokens, texts);
  }

  int64_t require_control(const std::string& piece, const fs::path& path) const {
    const auto found = control_ids.find(piece);
    if (found == control_ids.end()) throw LoadError(path.string(), piece, "control token is missing");
    return found->second;
  }

  // That of the name, where the control tokens allow it: mistral-finetune calls every file tokenizer.model.v3.
  TokenizerVersion version_of(const std::string& name) {
    const TokenizerVersion content = version_of_content();
    const TokenizerVersion named = version_of_name(name).value_or(content);
    const auto differ_in = [&](TokenizerVersion v) { return (named == v) != (content == v); };
    if (!differ_in(TokenizerVersion::kV1) && !differ_in(TokenizerVersion::kV7)) return named;
    if (note.empty()) note = name + " holds a tokenizer of version " + to_string(content) + ", which is used";
    return content;
  }

  // All versions have the same control ids, and name the unused ones "[control_8]". So the names identify the version.
  TokenizerVersion version_of_content() const {
    if (control_ids.count("[SYSTEM_PROMPT]")) return TokenizerVersion::kV7;
    if (control_ids.count("[IMG]")) return TokenizerVersion::kV3;
    if (control_ids.count("[INST]")) return TokenizerVersion::kV2;
    return TokenizerVersion::kV1;
  }

  const SentencePiece& at(int64_t id) const {
    static const SentencePiece none = {"", 0, PieceType::kNone};
    if (id < 0) throw std::out_of_range("tokenizer: id must be >= 0, got " + std::to_string(id));
    return id < static_cast<int64_t>(pieces.size()) ? pieces[static_cast<size_t>(id)] : none;
  }

  // What the normalizer, if there is one, does to text and to the tokens looked for in it.
  std::string normalize(std::string_view text) const {
    if (!normalizes) return std::string(text);
    return (prefix == SpacePrefix::kEvery ? std::string(kSpaceMark) : "") + with_marks(text);
  }

  std::string marked(std::string_view text, bool first) const {
    std::string out = with_marks(text);
    const bool prepend = prefix == SpacePrefix::kEvery || (prefix == SpacePrefix::kFirst && first) ||
                         (prefix == SpacePrefix::kEveryUnlessThere && !starts_with_mark(out)) ||
                         (prefix == SpacePrefix::kFirstUnlessThere && first && !starts_with_mark(out));
    if (prepend) out.insert(0, kSpaceMark);
    return out;
  }

  void encode_marked(std::string_view text, std::vector<int64_t>& ids) const {
    while (splits_at_spaces && !text.empty()) {
      const size_t space = std::min(text.find(kSpaceMark, 1), text.size());
      bpe.encode(text.substr(0, space), ids);
      text.remove_prefix(space);
    }
    if (!text.empty()) bpe.encode(text, ids);
  }

  void encode_part(std::string_view text, bool first, bool parse_special, std::vector<int64_t>& ids) const {
    const std::string normalized = normalize(text);
    for (const TextPart& part : normalized_added.split(normalized, parse_special)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
      } else if (normalizes && prefix == SpacePrefix::kEvery) {  // normalize() has put the mark
        encode_marked(part.text, ids);
      } else {
        encode_marked(marked(part.text, first && part.text.data() == normalized.data()), ids);
      }
    }
  }
};

bool Tokenizer::in_folder(const fs::path& folder) { return !find_tokenizer(folder).empty(); }

Tokenizer::Tokenizer(const fs::path& path, std::optional<TokenizerVersion> version)
    : impl_(std::make_shared<const Impl>(path, version)) {}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool add_bos, bool add_eos, bool parse_special) const {
  if (text.size() > kMaxTextBytes) {
    throw std::length_error("tokenizer: text must have at most 2^30 bytes, got " + std::to_string(text.size()));
  }
  std::vector<int64_t> ids;
  if (add_bos) ids.push_back(bos_id());
  for (const TextPart& part : impl_->added.split(text, parse_special)) {
    if (part.id >= 0) {
      ids.push_back(part.id);
    } else {
      impl_->encode_part(part.text, part.text.data() == text.data(), parse_special, ids);
    }
  }
  if (add_eos) ids.push_back(eos_id());
  return ids;
}

std::vector<int64_t> Tokenizer::special_in(std::string_view text) const { return impl_->all_added.special_in(text); }

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
const std::string& Tokenizer::note() const { return impl_->note; }

std::string StreamingDecoder::push(int64_t id) {
  const SentencePiece& piece = tokenizer_.impl_->at(id);
  if (piece.type == PieceType::kByte) {
    at_start_ = false;
    pending_ += static_cast<char>(byte_value(piece.text));
    return take_pending(/*wait_for_more=*/true);
  }
  std::string text = flush();
  if (piece.type == PieceType::kControl || piece.type == PieceType::kNone) return text;
  std::string_view rest = piece.type == PieceType::kUnknown ? tokenizer_.impl_->unknown_surface : piece.text;
  if (at_start_ && tokenizer_.impl_->prefix != SpacePrefix::kNever && starts_with_mark(rest))
    rest.remove_prefix(kSpaceMark.size());
  at_start_ = false;
  for (size_t space; (space = rest.find(kSpaceMark)) != rest.npos; rest.remove_prefix(space + kSpaceMark.size())) {
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
