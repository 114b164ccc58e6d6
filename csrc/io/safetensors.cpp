#include "safetensors.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "file_kind.h"
#include "json.h"
#include "load_error.h"

namespace mixtral {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 16 << 20;  // a tensor takes about 100
constexpr uint64_t kMaxFileBytes = uint64_t{1} << 62;

// 0 for a type that is unknown or, like most floats of 8 bits and less, of no use here.
uint64_t dtype_bytes(const std::string& dtype) {
  static const std::map<std::string, uint64_t> kBytes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"U16", 2}, {"I16", 2}, {"F16", 2},
      {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4},     {"U64", 8}, {"I64", 8}, {"F64", 8}};
  const auto found = kBytes.find(dtype);
  return found == kBytes.end() ? 0 : found->second;
}

// Every check of one tensor's header entry that needs no other tensor.
class EntryParser {
 public:
  EntryParser(const std::string& file, const std::string& name, uint64_t data_begin)
      : file_(file), name_(name), data_begin_(data_begin) {}

  TensorEntry parse(const json& value) const {
    check(value.is_object(), "must be an object, got ", value);
    TensorEntry entry;
    const json& dtype = field(value, "dtype");
    check(dtype.is_string() && dtype_bytes(dtype) > 0, "dtype must be a supported type, got ", dtype);
    entry.dtype = dtype;
    const json& shape = field(value, "shape");
    uint64_t bytes = dtype_bytes(entry.dtype);
    check(shape.is_array() && shape.size() <= kMaxTensorRank, "shape must be an array of at most 8 sizes, got ", shape);
    for (const json& size : shape) {
      check(size.is_number_unsigned() && size.get<uint64_t>() <= uint64_t{std::numeric_limits<int64_t>::max()},
            "shape must hold sizes in [0, 2^63), got ", shape);
      check(!__builtin_mul_overflow(bytes, size.get<uint64_t>(), &bytes), "shape must fit 64-bit sizes, got ", shape);
      entry.shape.push_back(size);
    }
    const json& offsets = field(value, "data_offsets");
    check(
        offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() && offsets[1].is_number_unsigned(),
        "data_offsets must be two sizes, got ", offsets);
    const uint64_t begin = offsets[0], end = offsets[1];
    check(begin <= end && end <= kMaxFileBytes, "data_offsets must rise and stay below 2^62, got ", offsets);
    check(end - begin == bytes, "data_offsets must span " + std::to_string(bytes) + " bytes, got ", offsets);
    entry.begin = data_begin_ + begin;
    entry.end = data_begin_ + end;
    return entry;
  }

 private:
  void check(bool condition, const std::string& rule, const json& got) const {
    if (!condition) throw LoadError(file_, name_, rule + shown(got));
  }
  const json& field(const json& value, const char* key) const {
    const auto found = value.find(key);
    if (found == value.end()) throw LoadError(file_, name_, std::string(key) + " is missing");
    return *found;
  }

  const std::string& file_;
  const std::string& name_;
  const uint64_t data_begin_;
};

void check_metadata(const std::string& file, const json& metadata) {
  const auto is_string = [](const json& value) { return value.is_string(); };
  if (!metadata.is_object() || !std::all_of(metadata.begin(), metadata.end(), is_string)) {
    throw LoadError(file, "__metadata__", "must be an object of strings, got " + shown(metadata));
  }
}

std::string cut_short(uint64_t expected, uint64_t got) {
  return "is cut short: must have " + std::to_string(expected) + " bytes, got " + std::to_string(got) +
         "; download it again";
}

// The tensors cover the data exactly: no hole, no overlap, nothing behind the last one.
void check_coverage(const std::string& file, const std::map<std::string, TensorEntry>& entries, uint64_t data_begin,
                    uint64_t file_bytes) {
  std::vector<std::pair<const std::string, TensorEntry> const*> order;
  for (const auto& named : entries) order.push_back(&named);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t next = data_begin;
  for (const auto* named : order) {
    if (named->second.begin != next) {
      throw LoadError(file, named->first,
                      "data must begin at byte " + std::to_string(next) + " of the file, got " +
                          std::to_string(named->second.begin));
    }
    next = named->second.end;
  }
  if (next > file_bytes) throw LoadError(file, "", cut_short(next, file_bytes));
  if (next < file_bytes) {
    throw LoadError(file, "",
                    "must end with its last tensor at byte " + std::to_string(next) + ", got " +
                        std::to_string(file_bytes) + " bytes");
  }
}

std::string read_header(const File& file) {
  check_kind(file);
  unsigned char prefix[8];
  if (file.size() < sizeof prefix)
    throw LoadError(file.path(), "", "must have at least 8 bytes, got " + std::to_string(file.size()));
  file.read(0, prefix, sizeof prefix);
  uint64_t bytes = 0;
  for (int i = 7; i >= 0; --i) bytes = bytes << 8 | prefix[i];
  if (bytes > kMaxHeaderBytes) {
    throw LoadError(file.path(), "",
                    "is no safetensors file: its header cannot have " + std::to_string(bytes) + " bytes");
  }
  if (bytes > file.size() - sizeof prefix)
    throw LoadError(file.path(), "", cut_short(sizeof prefix + bytes, file.size()));
  std::string header(bytes, '\0');
  file.read(sizeof prefix, header.data(), bytes);
  return header;
}

}  // namespace

TensorFile open_safetensors(const std::filesystem::path& path) {
  File file(path);
  const std::string text = read_header(file);
  const uint64_t data_begin = sizeof(uint64_t) + text.size();
  std::map<std::string, TensorEntry> entries;
  std::optional<std::map<std::string, std::string>> metadata;
  read_json_members(text, file.path(), [&](const std::string& name, const json& value) {
    bool is_new = true;
    if (name == "__metadata__") {
      is_new = !metadata;
      check_metadata(file.path(), value);
      metadata = value.get<std::map<std::string, std::string>>();
    } else {
      if (entries.size() == kMaxTensors) throw LoadError(file.path(), "", "must hold at most 65536 tensors");
      is_new = entries.emplace(name, EntryParser(file.path(), name, data_begin).parse(value)).second;
    }
    if (!is_new) throw LoadError(file.path(), name, "key occurs twice");
  });
  check_coverage(file.path(), entries, data_begin, file.size());
  return TensorFile(std::move(file), std::move(entries),
                    std::move(metadata).value_or(std::map<std::string, std::string>()));
}

}  // namespace mixtral
