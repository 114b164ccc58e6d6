#include "gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "byte_reader.h"
#include "file_cursor.h"
#include "file_kind.h"
#include "ggml_type.h"
#include "load_error.h"
#include "utf8.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxEntries = 65536;        // of metadata, and tensors
constexpr uint64_t kMaxNameBytes = 65535;      // the format's own limit for keys
constexpr uint64_t kMaxTextBytes = 1 << 20;    // of one text
constexpr uint64_t kMaxArrayBytes = 64 << 20;  // of one array that is read
constexpr uint64_t kMaxTexts = 1 << 18;        // of one array
constexpr uint32_t kMaxRank = 4;
enum : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBoolean, kString, kArrayOf, kU64, kI64, kF64 };

constexpr char kMagic[] = {'G', 'G', 'U', 'F'};

bool is_gguf(const File& file) {
  char magic[sizeof kMagic] = {};
  file.read(0, magic, std::min<uint64_t>(file.size(), sizeof magic));
  return std::memcmp(magic, kMagic, sizeof magic) == 0;
}

uint64_t bytes_of(uint32_t type) {
  static constexpr uint64_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // 0: no fixed size
  return type < std::size(kBytes) ? kBytes[type] : 0;
}

GgufValue read_array(FileCursor& cursor) {
  GgufValue value;
  value.kind = GgufValue::kArray;
  value.element_type = cursor.number<uint32_t>();
  value.count = cursor.number<uint64_t>();
  value.begin = cursor.position();
  if (value.element_type == kString) {
    for (uint64_t i = 0; i < value.count; ++i) cursor.skip(cursor.number<uint64_t>());
  } else {
    uint64_t bytes = bytes_of(value.element_type);
    if (bytes == 0) cursor.fail("an array must hold texts, numbers or booleans");
    if (__builtin_mul_overflow(bytes, value.count, &bytes)) cursor.fail("ends within its header");
    cursor.skip(bytes);
  }
  value.end = cursor.position();
  return value;
}

GgufValue read_value(FileCursor& cursor, uint32_t type) {
  GgufValue value;
  const auto integer = [&](int64_t number) { value.integer = number; };
  const auto real = [&](double number) {
    value.kind = GgufValue::kNumber;
    value.number = number;
  };
  switch (type) {
    case kU8:
      integer(cursor.number<uint8_t>());
      break;
    case kI8:
      integer(cursor.number<int8_t>());
      break;
    case kU16:
      integer(cursor.number<uint16_t>());
      break;
    case kI16:
      integer(cursor.number<int16_t>());
      break;
    case kU32:
      integer(cursor.number<uint32_t>());
      break;
    case kI32:
      integer(cursor.number<int32_t>());
      break;
    case kI64:
      integer(cursor.number<int64_t>());
      break;
    case kU64: {
      const auto number = cursor.number<uint64_t>();
      if (number > uint64_t{std::numeric_limits<int64_t>::max()}) cursor.fail("an integer must be below 2^63");
      integer(static_cast<int64_t>(number));
      break;
    }
    case kF32:
      real(cursor.number<float>());
      break;
    case kF64:
      real(cursor.number<double>());
      break;
    case kBoolean:
      integer(cursor.number<uint8_t>() != 0);
      value.kind = GgufValue::kBool;
      break;
    case kString:
      value.text = cursor.text(kMaxTextBytes);
      value.kind = GgufValue::kText;
      break;
    case kArrayOf:
      return read_array(cursor);
    default:
      cursor.fail("the type of a value must be 0 to 12, got " + std::to_string(type));
  }
  return value;
}

std::string read_name(FileCursor& cursor) {
  std::string name = cursor.text(kMaxNameBytes);
  if (!is_valid_utf8(name)) cursor.fail("a name must be UTF-8");
  return name;
}

struct TensorInfo {
  std::string name;
  TensorEntry entry;  // begin and end relative to the data
};

TensorInfo read_tensor_info(FileCursor& cursor, const File& file) {
  TensorInfo info;
  info.name = read_name(cursor);
  const auto check = [&](bool ok, const std::string& reason) {
    if (!ok) throw LoadError(file.path(), info.name, reason);
  };
  const auto rank = cursor.number<uint32_t>();
  check(rank <= kMaxRank, "must have at most 4 dimensions, got " + std::to_string(rank));
  for (uint32_t d = 0; d < rank; ++d) {
    const auto size = cursor.number<uint64_t>();
    check(size <= uint64_t{std::numeric_limits<int64_t>::max()}, "a size must be below 2^63");
    info.entry.shape.insert(info.entry.shape.begin(), static_cast<int64_t>(size));
  }
  const auto id = cursor.number<uint32_t>();
  const GgmlType* const type = find_ggml_type(id);
  check(type != nullptr, "has the type " + std::to_string(id) + ", which is not known");
  info.entry.dtype = type->name;
  const int64_t cols = rank == 0 ? 1 : info.entry.shape.back();
  check(cols % type->elements == 0, std::string(type->name) + " needs rows of whole blocks of " +
                                        std::to_string(type->elements) + " elements, got " + std::to_string(cols));
  uint64_t bytes = type->bytes;
  bool fits = !__builtin_mul_overflow(bytes, static_cast<uint64_t>(cols / type->elements), &bytes);
  for (size_t d = 0; d + 1 < info.entry.shape.size(); ++d) {
    fits = fits && !__builtin_mul_overflow(bytes, static_cast<uint64_t>(info.entry.shape[d]), &bytes);
  }
  info.entry.begin = cursor.number<uint64_t>();
  fits = fits && !__builtin_add_overflow(info.entry.begin, bytes, &info.entry.end) && info.entry.end <= file.size();
  check(fits, "must lie within the file of " + std::to_string(file.size()) + " bytes");
  return info;
}

uint64_t round_up(uint64_t value, uint64_t alignment) { return (value + alignment - 1) / alignment * alignment; }

// Tensors lie one behind the other, each at a multiple of `alignment`, as every writer puts them.
std::map<std::string, TensorEntry> read_tensors(FileCursor& cursor, const File& file, uint64_t count,
                                                uint64_t alignment) {
  std::vector<TensorInfo> infos;
  for (uint64_t i = 0; i < count; ++i) infos.push_back(read_tensor_info(cursor, file));
  const uint64_t data = round_up(cursor.position(), alignment);
  std::map<std::string, TensorEntry> entries;
  uint64_t next = 0;
  for (TensorInfo& info : infos) {
    TensorEntry& entry = info.entry;
    if (entry.begin != next) {
      throw LoadError(
          file.path(), info.name,
          "must begin at byte " + std::to_string(next) + " of the data, got " + std::to_string(entry.begin));
    }
    next = round_up(entry.end, alignment);
    entry.begin += data;
    entry.end += data;
    if (entry.end > file.size()) {
      throw LoadError(file.path(), info.name, "must lie within the file of " + std::to_string(file.size()) + " bytes");
    }
    if (!entries.emplace(info.name, std::move(entry)).second) throw LoadError(file.path(), info.name, "occurs twice");
  }
  return entries;
}

void check_version(FileCursor& cursor, const File& file) {
  if (!is_gguf(file)) {
    check_kind(file);
    cursor.fail("is not a GGUF file");
  }
  cursor.skip(sizeof kMagic);
  const auto version = cursor.number<uint32_t>();
  if (version != 2 && version != 3) {
    cursor.fail("GGUF version must be 2 or 3, little-endian, got " + std::to_string(version));
  }
}

}  // namespace

GgufFile open_gguf(const fs::path& path) {
  File file(path);
  FileCursor cursor(file);
  check_version(cursor, file);
  const auto tensor_count = cursor.number<uint64_t>(), metadata_count = cursor.number<uint64_t>();
  if (tensor_count > kMaxEntries) cursor.fail("must hold at most 65536 tensors, got " + std::to_string(tensor_count));
  if (metadata_count > kMaxEntries) {
    cursor.fail("must hold at most 65536 metadata entries, got " + std::to_string(metadata_count));
  }
  std::map<std::string, GgufValue> metadata;
  for (uint64_t i = 0; i < metadata_count; ++i) {
    std::string key = read_name(cursor);
    const auto type = cursor.number<uint32_t>();
    if (metadata.count(key) != 0) throw LoadError(file.path(), key, "occurs twice");
    metadata.emplace(std::move(key), read_value(cursor, type));
  }
  const auto aligned = metadata.find("general.alignment");
  const int64_t alignment = aligned == metadata.end() ? 32 : aligned->second.integer;
  if (alignment < 1 || alignment > 1 << 20 || (alignment & (alignment - 1)) != 0) {
    throw LoadError(file.path(), "general.alignment", "must be a power of two up to 2^20");
  }
  auto entries = read_tensors(cursor, file, tensor_count, static_cast<uint64_t>(alignment));
  return {TensorFile(std::move(file), std::move(entries)), std::move(metadata)};
}

const GgufValue* GgufFile::find(const std::string& key) const {
  const auto found = metadata.find(key);
  return found == metadata.end() ? nullptr : &found->second;
}

const GgufValue& GgufFile::at(const std::string& key, GgufValue::Kind kind, const char* expected) const {
  const GgufValue* const value = find(key);
  if (value == nullptr) throw LoadError(tensors.path(), key, "is missing");
  if (value->kind != kind) throw LoadError(tensors.path(), key, std::string("must be ") + expected);
  return *value;
}

int64_t GgufFile::integer(const std::string& key) const { return at(key, GgufValue::kInteger, "an integer").integer; }

int64_t GgufFile::integer(const std::string& key, int64_t absent) const {
  return find(key) != nullptr ? integer(key) : absent;
}

double GgufFile::number(const std::string& key) const { return at(key, GgufValue::kNumber, "a float").number; }

std::string GgufFile::text(const std::string& key) const { return at(key, GgufValue::kText, "a text").text; }

std::string GgufFile::array_bytes(const std::string& key, uint32_t element_type, const char* expected) const {
  const GgufValue& value = at(key, GgufValue::kArray, expected);
  if (value.element_type != element_type) throw LoadError(tensors.path(), key, std::string("must be ") + expected);
  if (value.end - value.begin > kMaxArrayBytes) throw LoadError(tensors.path(), key, "must have at most 64 MiB");
  std::string bytes(value.end - value.begin, '\0');
  tensors.read(value.begin, bytes.data(), bytes.size());
  return bytes;
}

std::vector<std::string> GgufFile::texts(const std::string& key) const {
  const std::string bytes = array_bytes(key, kString, "an array of texts");
  if (find(key)->count > kMaxTexts) throw LoadError(tensors.path(), key, "must have at most 2^18 texts");
  ByteReader reader(bytes, tensors.path(), key);
  std::vector<std::string> texts;
  while (!reader.at_end()) texts.emplace_back(reader.take(reader.number<uint64_t>()));
  return texts;
}

std::vector<float> GgufFile::numbers(const std::string& key) const {
  const std::string bytes = array_bytes(key, kF32, "an array of f32");
  std::vector<float> numbers(bytes.size() / sizeof(float));
  if (!numbers.empty()) std::memcpy(numbers.data(), bytes.data(), bytes.size());
  return numbers;
}

std::vector<int32_t> GgufFile::integers(const std::string& key) const {
  const std::string bytes = array_bytes(key, kI32, "an array of i32");
  std::vector<int32_t> integers(bytes.size() / sizeof(int32_t));
  if (!integers.empty()) std::memcpy(integers.data(), bytes.data(), bytes.size());
  return integers;
}

fs::path find_gguf(const fs::path& path) {
  std::error_code ignored;
  if (fs::is_regular_file(path, ignored)) return path.extension() == ".gguf" || is_gguf(File(path)) ? path : fs::path();
  fs::path found;
  for (fs::directory_iterator entry(path, ignored), end; !ignored && entry != end; entry.increment(ignored)) {
    if (entry->path().extension() != ".gguf") continue;
    if (!found.empty()) throw LoadError(path.string(), "", "holds several .gguf files: name one of them");
    found = entry->path();
  }
  return found;
}

}  // namespace mixtral
