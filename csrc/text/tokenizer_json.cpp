#include "tokenizer_json.h"

#include <algorithm>
#include <unordered_map>

#include "../io/json.h"
#include "../io/load_error.h"
#include "../io/utf8.h"
#include "tokenizer_json_reader.h"

namespace mixtral {
namespace {

using nlohmann::json;

class Parser {
 public:
  Parser(const std::string& text, const std::string& file) : file_(file), json_(read_tokenizer_json(text, file)) {}

  Vocabulary parse() {
    check_model();
    read_spaces();
    read_pieces();
    read_merges();
    read_added_tokens();
    return std::move(vocabulary_);
  }

 private:
  [[noreturn]] void fail(const std::string& item, const std::string& reason) const {
    throw LoadError(file_, item, reason);
  }

  [[noreturn]] void refuse(const std::string& kind) const {
    fail("", "is " + kind + ", which is not supported: only BPE with byte fallback (SentencePiece) is");
  }

  static bool is_type(const json& object, const char* type) {
    return object.is_object() && object.value("type", json()) == type;
  }

  static std::string type_of(const json& object) {
    const json type = object.is_object() ? object.value("type", json()) : object;
    return type.is_string() ? type.get<std::string>() : shown(type);
  }

  void check_model() {
    if (!json_.rest.contains("model")) {
      refuse(json_.rest.empty() ? "a tokenizer without a \"model\" (tekken, perhaps)"
                                : "a tokenizer without a \"model\"");
    }
    const json& model = json_.rest["model"];
    if (!model.is_object()) fail("model", "must be an object");
    if (model.contains("type") && !is_type(model, "BPE")) refuse("a " + type_of(model) + " tokenizer");
    if (byte_level(json_.rest.value("pre_tokenizer", json()))) refuse("a byte-level BPE tokenizer (tekken, GPT-2)");
    if (model.value("byte_fallback", json()) != true) refuse("a BPE tokenizer without byte fallback");
    const auto require_unset = [&](const char* key, const json& unset) {
      const json value = model.value(key, json());
      if (!value.is_null() && value != unset) fail(key, "must be null or " + shown(unset) + ", got " + shown(value));
    };
    require_unset("dropout", 0.0);
    require_unset("continuing_subword_prefix", "");
    require_unset("end_of_word_suffix", "");
    require_unset("ignore_merges", false);
    for (const char* key : {"vocab", "merges"}) {
      if (!model.contains(key)) fail(key, "is missing");
    }
    if (!model["vocab"].is_object()) fail("vocab", "must be an object");
    if (!model["merges"].is_array()) fail("merges", "must be a list");
  }

  bool byte_level(const json& pre_tokenizer) const {
    if (is_type(pre_tokenizer, "ByteLevel")) return true;
    if (!is_type(pre_tokenizer, "Sequence")) return false;
    for (const json& step : steps_of(pre_tokenizer, "pretokenizers")) {
      if (is_type(step, "ByteLevel")) return true;
    }
    return false;
  }

  // A step, or the steps of a "Sequence"; none for null.
  std::vector<json> steps_of(const json& value, const char* key) const {
    if (value.is_null()) return {};
    if (!is_type(value, "Sequence")) return {value};
    const json steps = value.value(key, json());
    if (!steps.is_array()) fail(key, "must be a list");
    return {steps.begin(), steps.end()};
  }

  // Where U+2581 comes from: a normalizer that prepends and replaces, or the pre-tokenizer Metaspace.
  void read_spaces() {
    bool prepends = false, replaces = false;
    for (const json& step : steps_of(json_.rest.value("normalizer", json()), "normalizers")) {
      if (is_type(step, "Prepend") && step.value("prepend", json()) == kSpaceMark && !prepends) {
        prepends = true;
      } else if (is_type(step, "Replace") && step.value("pattern", json()) == json{{"String", " "}} &&
                 step.value("content", json()) == kSpaceMark) {
        replaces = true;
      } else {
        fail("normalizer", "must prepend U+2581 or replace spaces by it, got " + type_of(step));
      }
    }
    const std::vector<json> steps = steps_of(json_.rest.value("pre_tokenizer", json()), "pretokenizers");
    if (steps.size() > 1 || (steps.size() == 1 && !is_type(steps[0], "Metaspace"))) {
      fail("pre_tokenizer", "must be null or Metaspace, got " + (steps.size() > 1 ? "Sequence" : type_of(steps[0])));
    }
    if (!replaces && steps.empty()) fail("normalizer", "must replace spaces by U+2581");
    vocabulary_.normalizes = prepends || replaces;
    vocabulary_.prefix = prepends ? SpacePrefix::kEvery : SpacePrefix::kNever;
    if (!steps.empty()) read_metaspace(steps[0], prepends);
  }

  void read_metaspace(const json& step, bool prepends) {
    if (step.value("replacement", json()) != kSpaceMark) fail("pre_tokenizer", "Metaspace must replace by U+2581");
    const json scheme = step.value("prepend_scheme", json());
    const json adds = step.value("add_prefix_space", json());
    const json split = step.value("split", json());
    vocabulary_.splits_at_spaces = split != false;
    const bool never = scheme == "never" || (scheme.is_null() && adds == false);
    if (never) return;
    if (prepends) fail("pre_tokenizer", "Metaspace and a normalizer must not both prepend U+2581");
    if (!scheme.is_null() && scheme != "first" && scheme != "always") {
      fail("prepend_scheme", "must be always, first or never, got " + shown(scheme));
    }
    vocabulary_.prefix = scheme == "first" ? SpacePrefix::kFirstUnlessThere : SpacePrefix::kEveryUnlessThere;
  }

  void read_pieces() {
    if (json_.vocabulary.empty()) fail("vocab", "must not be empty");
    int64_t last = 0;
    for (const auto& [text, id] : json_.vocabulary) {
      check_piece(text, id);
      last = std::max(last, id);
    }
    std::vector<SentencePiece>& pieces = vocabulary_.pieces;
    pieces.resize(static_cast<size_t>(last) + 1, {"", 0, PieceType::kNone});
    const json unknown = json_.rest["model"].value("unk_token", json());
    size_t bytes = 0;
    for (auto& [text, id] : json_.vocabulary) {
      SentencePiece& piece = pieces[static_cast<size_t>(id)];
      if (piece.type != PieceType::kNone) {
        fail("vocab: " + text, "has the id " + std::to_string(id) + " of another piece");
      }
      piece.text = std::move(text);
      piece.type = unknown == piece.text         ? PieceType::kUnknown
                   : byte_value(piece.text) >= 0 ? PieceType::kByte
                                                 : PieceType::kNormal;
      bytes += piece.type == PieceType::kByte;
    }
    if (bytes != 256) fail("vocab", "must have 256 byte pieces, got " + std::to_string(bytes));
    json_.vocabulary = {};
    for (size_t id = 0; id < pieces.size(); ++id) {
      if (pieces[id].type == PieceType::kNone) continue;
      if (!ids_.emplace(pieces[id].text, id).second) fail("vocab: " + pieces[id].text, "occurs twice");
    }
  }

  void check_piece(const std::string& text, int64_t id) const {
    const std::string item = "vocab: " + text;
    if (id < 0 || id >= kMaxTokens) fail(item, "id must be in [0, 2^18), got " + std::to_string(id));
    if (text.empty()) fail(item, "text must not be empty");
    if (text.size() > kMaxPieceBytes) {
      fail(item, "text must have at most 1024 bytes, got " + std::to_string(text.size()));
    }
  }

  void read_merges() {
    vocabulary_.ranked = true;
    vocabulary_.merges.reserve(json_.merge_count());
    for (size_t i = 0; i < json_.merge_count(); ++i) {
      const std::string left(json_.merge_half(2 * i)), right(json_.merge_half(2 * i + 1));
      const auto id_of = [&](const std::string& text) {
        const auto found = ids_.find(text);
        if (found == ids_.end()) fail("merge " + std::to_string(i) + " (" + left + " " + right + ")", "not in vocab");
        return static_cast<int32_t>(found->second);
      };
      vocabulary_.merges.push_back({id_of(left), id_of(right), id_of(left + right)});
    }
  }

  void read_added_tokens() {
    const auto tokens = json_.rest.find("added_tokens");
    if (tokens == json_.rest.end()) return;
    if (!tokens->is_array()) fail("added_tokens", "must be a list");
    for (const json& token : *tokens) {
      const json id = token.is_object() ? token.value("id", json()) : json();
      if (!id.is_number_integer()) fail("added_tokens", "id must be a whole number, got " + shown(id));
      if (id.is_number_unsigned() && id.get<uint64_t>() > static_cast<uint64_t>(kMaxTokens)) {
        fail("added_tokens", "id must be in [0, 2^18), got " + shown(id));
      }
      vocabulary_.added.push_back(read_added_token(token, id.get<int64_t>(), file_));
      const AddedToken& added = vocabulary_.added.back();
      const auto found = ids_.find(added.text);
      if (found != ids_.end() && found->second != added.id) {
        fail("added_tokens: " + added.text,
             "has the id " + std::to_string(found->second) + " in vocab, " + std::to_string(added.id) + " here");
      }
    }
  }

  const std::string& file_;
  TokenizerJson json_;
  Vocabulary vocabulary_;
  std::unordered_map<std::string_view, int64_t> ids_;  // keys point into the pieces
};

}  // namespace

AddedToken read_added_token(const json& object, int64_t id, const std::string& file) {
  const auto fail = [&](const std::string& reason) {
    throw LoadError(file, "added token " + std::to_string(id), reason);
  };
  AddedToken token;
  token.id = id;
  if (id < 0 || id >= kMaxTokens) fail("id must be in [0, 2^18)");
  const json content = object.is_object() ? object.value("content", json()) : json();
  if (!content.is_string()) fail("content must be a text, got " + shown(content));
  token.text = content.get<std::string>();
  if (token.text.empty()) fail("content must not be empty");
  if (token.text.size() > kMaxPieceBytes) fail("content must have at most 1024 bytes");
  const auto flag = [&](const char* key, bool otherwise) {
    const json value = object.value(key, json());
    if (!value.is_null() && !value.is_boolean()) fail(std::string(key) + " must be true or false, got " + shown(value));
    return value.is_null() ? otherwise : value.get<bool>();
  };
  token.special = flag("special", false);
  token.lstrip = flag("lstrip", false);
  token.rstrip = flag("rstrip", false);
  token.single_word = flag("single_word", false);
  token.normalized = flag("normalized", !token.special);
  return token;
}

Vocabulary parse_tokenizer_json(const std::string& text, const std::string& file) { return Parser(text, file).parse(); }

}  // namespace mixtral
