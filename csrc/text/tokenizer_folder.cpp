#include "tokenizer_folder.h"

#include <set>
#include <unordered_map>
#include <utility>

#include "../io/file.h"
#include "../io/file_kind.h"
#include "../io/json.h"
#include "../io/load_error.h"
#include "sentencepiece_file.h"
#include "tokenizer_json.h"
#include "tokenizer_version.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr uint64_t kMaxTokenizerBytes = uint64_t{32} << 20;
constexpr uint64_t kMaxConfigBytes = uint64_t{8} << 20;

std::string read_file(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) throw LoadError(path.string(), "", "not a file");
  check_kind(File(path));
  return read_text(path, kMaxTokenizerBytes);
}

Vocabulary read_sentencepiece(const fs::path& path) {
  SentencePieceFile file = parse_sentencepiece_file(read_file(path), path.string());
  Vocabulary vocabulary;
  vocabulary.pieces = std::move(file.pieces);
  vocabulary.unknown_surface = std::move(file.unknown_surface);
  return vocabulary;
}

bool has_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

json read_small(const fs::path& path) {
  return has_file(path) ? parse_json(read_text(path, kMaxConfigBytes), path.string()) : json::object();
}

// A special token of tokenizer_config.json and special_tokens_map.json: a text, or an object with one.
void add_texts(const json& value, std::set<std::string>& texts) {
  if (value.is_string()) texts.insert(value.get<std::string>());
  if (value.is_object() && value.value("content", json()).is_string())
    texts.insert(value["content"].get<std::string>());
  if (value.is_array()) {
    for (const json& item : value) {
      if (!item.is_array()) add_texts(item, texts);
    }
  }
}

std::set<std::string> special_texts(const json& config, const json& map) {
  std::set<std::string> texts;
  for (const json* source : {&config, &map}) {
    for (const char* key : {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
                            "additional_special_tokens", "extra_special_tokens"}) {
      if (source->contains(key)) add_texts((*source)[key], texts);
    }
  }
  return texts;
}

int64_t decimal(const std::string& text, const std::string& file) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) {
    throw LoadError(file, "added_tokens_decoder", "an id must be a whole number, got " + text);
  }
  return std::stoll(text);
}

// The tokens of tokenizer_config.json and added_tokens.json.
std::vector<AddedToken> tokens_beside(const fs::path& folder, const json& config) {
  std::vector<AddedToken> tokens;
  const std::string config_file = (folder / "tokenizer_config.json").string();
  const json decoder = config.value("added_tokens_decoder", json::object());
  if (!decoder.is_object()) throw LoadError(config_file, "added_tokens_decoder", "must be an object");
  for (const auto& [id, token] : decoder.items()) {
    tokens.push_back(read_added_token(token, decimal(id, config_file), config_file));
  }
  const fs::path added_file = folder / "added_tokens.json";
  const std::set<std::string> special = special_texts(config, read_small(folder / "special_tokens_map.json"));
  const json added = read_small(added_file);
  for (const auto& [text, id] : added.items()) {
    if (!id.is_number_integer())
      throw LoadError(added_file.string(), text, "id must be a whole number, got " + shown(id));
    const json token = {{"content", text}, {"special", special.count(text) != 0}};
    const bool huge = id.is_number_unsigned() && id.get<uint64_t>() > uint64_t{INT32_MAX};
    tokens.push_back(read_added_token(token, huge ? -1 : id.get<int64_t>(), added_file.string()));
  }
  return tokens;
}

std::string quoted(const std::string& text, int64_t id) {
  return json(text).dump(-1, ' ', true) + " (" + std::to_string(id) + ")";
}

// The added tokens whose id and text are free, or agree with the vocabulary. Of tokens with one id the first counts.
void add_tokens(Vocabulary& vocabulary, std::string& note) {
  std::vector<SentencePiece>& pieces = vocabulary.pieces;
  for (const AddedToken& token : vocabulary.added) {
    if (token.id >= static_cast<int64_t>(pieces.size())) pieces.resize(token.id + 1, {"", 0, PieceType::kNone});
  }
  std::unordered_map<std::string_view, int64_t> ids;  // keys point into `pieces`
  for (size_t id = 0; id < pieces.size(); ++id) {
    if (pieces[id].type != PieceType::kNone) ids.emplace(pieces[id].text, id);
  }
  std::set<int64_t> known;
  std::vector<AddedToken> added;
  for (AddedToken& token : vocabulary.added) {
    const auto index = static_cast<size_t>(token.id);
    const auto place = ids.find(token.text);
    const bool taken = pieces[index].type != PieceType::kNone;
    if (place == ids.end() ? taken : place->second != token.id) {
      if (note.empty()) note = "the added token " + quoted(token.text, token.id) + " does not fit the vocabulary";
      continue;
    }
    if (!known.insert(token.id).second) continue;
    SentencePiece& piece = pieces[index];
    if (!taken) piece = {token.text, 0, PieceType::kAdded};
    ids.emplace(piece.text, token.id);
    if (token.special && piece.type != PieceType::kUnknown && piece.type != PieceType::kByte) {
      piece.type = PieceType::kControl;
    }
    token.special = token.special || piece.type == PieceType::kControl;
    added.push_back(std::move(token));
  }
  while (pieces.back().type == PieceType::kNone) pieces.pop_back();
  // The control tokens of a SentencePiece file are special tokens, listed or not.
  for (size_t id = 0; id < pieces.size(); ++id) {
    if (pieces[id].type != PieceType::kControl || known.count(static_cast<int64_t>(id)) != 0) continue;
    added.push_back({static_cast<int64_t>(id), pieces[id].text, true});
  }
  vocabulary.added = std::move(added);
}

// The first id of which the two vocabularies have different pieces.
std::string difference(const Vocabulary& model, const Vocabulary& json) {
  for (size_t id = 0; id < model.pieces.size(); ++id) {
    if (id >= json.pieces.size() || model.pieces[id].text != json.pieces[id].text) {
      return "tokenizer.json has another vocabulary than tokenizer.model, which is used: the first other id is " +
             std::to_string(id);
    }
  }
  return "";
}

// What tokenizer.json says beside a tokenizer.model: added tokens, and whether text after one gets a space.
void merge_tokenizer_json(const fs::path& path, Vocabulary& vocabulary, std::string& note) {
  try {
    Vocabulary json = parse_tokenizer_json(read_file(path), path.string());
    vocabulary.added = std::move(json.added);
    const bool every = json.prefix == SpacePrefix::kEvery || json.prefix == SpacePrefix::kEveryUnlessThere;
    vocabulary.prefix = every ? SpacePrefix::kEvery : SpacePrefix::kFirst;
    note = difference(vocabulary, json);
  } catch (const LoadError& error) {
    note = "tokenizer.model is used, not tokenizer.json, which " + (error.item().empty() ? "" : error.item() + ": ") +
           error.reason();
  }
}

}  // namespace

fs::path find_tokenizer(const fs::path& folder) {
  std::error_code error;
  fs::path best;
  int best_version = -1;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    const std::optional<TokenizerVersion> version = version_of_name(name);
    if (!version && name != "tokenizer.model") continue;
    const int number = version ? static_cast<int>(*version) : 0;
    if (number > best_version) {
      best = entry->path();
      best_version = number;
    }
  }
  if (best.empty() && fs::exists(folder / "tokenizer.json", error)) best = folder / "tokenizer.json";
  return best;
}

TokenizerFiles read_tokenizer(const fs::path& path) {
  std::error_code error;
  const bool folder = fs::is_directory(path, error);
  TokenizerFiles files;
  files.path = folder ? find_tokenizer(path) : path;
  if (files.path.empty()) {
    const bool tekken = fs::exists(path / "tekken.json", error);
    throw LoadError(path.string(), "",
                    tekken ? "has a tekken tokenizer, which is not supported: no tokenizer.model, no tokenizer.json"
                           : "no tokenizer.model or tokenizer.json in this folder");
  }
  const bool json_file = files.path.extension() == ".json";
  Vocabulary& vocabulary = files.vocabulary;
  vocabulary =
      json_file ? parse_tokenizer_json(read_file(files.path), files.path.string()) : read_sentencepiece(files.path);
  if (folder) {
    const json config = read_small(path / "tokenizer_config.json");
    const bool legacy = config.value("legacy", json()) == true;
    if (!json_file) vocabulary.prefix = legacy ? SpacePrefix::kEvery : SpacePrefix::kFirst;
    if (!json_file && has_file(path / "tokenizer.json")) {
      merge_tokenizer_json(path / "tokenizer.json", vocabulary, files.note);
    }
    for (AddedToken& token : tokens_beside(path, config)) vocabulary.added.push_back(std::move(token));
  }
  add_tokens(vocabulary, files.note);
  return files;
}

}  // namespace mixtral
