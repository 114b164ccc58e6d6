#include "torch_pickle.h"

#include <algorithm>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "file_kind.h"
#include "load_error.h"
#include "pickle.h"
#include "utf8.h"
#include "zip_file.h"

namespace mixtral {
namespace {

using Kind = PickleValue::Kind;
using Members = std::map<std::string, ZipMember>;

constexpr uint64_t kMaxPickleBytes = 4 << 20;
constexpr std::string_view kRebuildTensor = "torch._utils._rebuild_tensor_v2";
constexpr std::string_view kRebuildParameter = "torch._utils._rebuild_parameter";

struct StorageType {
  std::string_view global;
  const char* dtype;
  uint64_t bytes;
};
constexpr StorageType kStorageTypes[] = {{"torch.FloatStorage", "F32", 4}, {"torch.BFloat16Storage", "BF16", 2},
                                         {"torch.HalfStorage", "F16", 2},  {"torch.DoubleStorage", "F64", 8},
                                         {"torch.LongStorage", "I64", 8},  {"torch.IntStorage", "I32", 4},
                                         {"torch.ShortStorage", "I16", 2}, {"torch.CharStorage", "I8", 1},
                                         {"torch.ByteStorage", "U8", 1},   {"torch.BoolStorage", "BOOL", 1}};

std::set<std::string_view> known_globals() {
  std::set<std::string_view> globals = {kRebuildTensor, kRebuildParameter};
  for (const StorageType& type : kStorageTypes) globals.insert(type.global);
  return globals;
}

// From the values of the pickle to the tensors of the file.
class StateDict {
 public:
  StateDict(const Pickle& pickle, const Members& members, const std::string& root, const std::string& file)
      : pickle_(pickle), members_(members), root_(root), file_(file) {}

  std::map<std::string, TensorEntry> tensors() const {
    std::map<std::string, TensorEntry> entries;
    const PickleValue& dict = find_dict();
    for (size_t i = 0; i < dict.items.size(); i += 2) {
      const PickleValue* const call = tensor_call(pickle_.item(dict, i + 1));
      if (call == nullptr) continue;  // a number or a text beside the tensors
      const PickleValue& key = pickle_.item(dict, i);
      if (key.kind != Kind::kText || !is_valid_utf8(key.text)) fail("", "must have names of text for its tensors");
      const std::string name(key.text);
      if (entries.size() == kMaxTensors) fail("", "must hold at most 65536 tensors");
      if (!entries.emplace(name, read_tensor(name, *call)).second) fail(name, "occurs twice");
    }
    if (entries.empty()) fail("", "holds no tensor: expected a state dict");
    return entries;
  }

 private:
  [[noreturn]] void fail(const std::string& item, const std::string& reason) const {
    throw LoadError(file_, item, reason);
  }
  void check(bool ok, const std::string& name, const char* reason) const {
    if (!ok) fail(name, reason);
  }

  // The root, or the dict beneath it that training scripts put the weights in.
  const PickleValue& find_dict() const {
    const PickleValue& root = pickle_.at(pickle_.root);
    if (root.kind != Kind::kDict) fail("", "must hold a dict of tensors");
    const PickleValue* inner = nullptr;
    for (size_t i = 0; i < root.items.size(); i += 2) {
      const PickleValue &key = pickle_.item(root, i), &value = pickle_.item(root, i + 1);
      if (tensor_call(value)) return root;
      const bool named =
          key.text == "state_dict" || key.text == "model" || key.text == "model_state_dict" || key.text == "module";
      if (named && value.kind == Kind::kDict && inner == nullptr) inner = &value;
    }
    return inner != nullptr ? *inner : root;
  }

  bool calls(const PickleValue& value, std::string_view function) const {
    return value.kind == Kind::kCall && pickle_.item(value, 0).text == function;
  }

  // The call that makes the tensor, nullptr for a value that is none.
  const PickleValue* tensor_call(const PickleValue& value) const {
    const bool parameter = calls(value, kRebuildParameter) && value.items.size() > 1;
    const PickleValue& call = parameter ? pickle_.item(value, 1) : value;
    return calls(call, kRebuildTensor) ? &call : nullptr;
  }

  // Its arguments: storage, offset, shape, strides, ...
  TensorEntry read_tensor(const std::string& name, const PickleValue& call) const {
    check(call.items.size() >= 5, name, "has too few arguments");
    const PickleValue &offset = pickle_.item(call, 2), &shape = pickle_.item(call, 3), &strides = pickle_.item(call, 4);
    check(offset.kind == Kind::kNumber && shape.kind == Kind::kTuple && strides.kind == Kind::kTuple, name,
          "must have an offset, a shape and strides");
    const auto [type, storage] = find_storage(name, pickle_.item(call, 1));
    TensorEntry entry;
    entry.dtype = type->dtype;
    uint64_t bytes = type->bytes, begin = 0, end = 0;
    check(shape.items.size() <= kMaxTensorRank, name, "shape must have at most 8 sizes");
    for (size_t d = 0; d < shape.items.size(); ++d) {
      const PickleValue& size = pickle_.item(shape, d);
      check(size.kind == Kind::kNumber && size.number >= 0, name, "shape must hold sizes in [0, 2^63)");
      check(!__builtin_mul_overflow(bytes, static_cast<uint64_t>(size.number), &bytes), name,
            "shape must fit 64-bit sizes");
      entry.shape.push_back(size.number);
    }
    check(bytes == 0 || is_contiguous(entry.shape, strides), name,
          "must be contiguous, row after row; save it as tensor.contiguous()");
    const bool fits = offset.number >= 0 &&
                      !__builtin_mul_overflow(static_cast<uint64_t>(offset.number), type->bytes, &begin) &&
                      !__builtin_add_overflow(begin, bytes, &end) && end <= storage.end - storage.begin;
    check(fits, name, "must lie within its storage");
    entry.begin = storage.begin + begin;
    entry.end = storage.begin + end;
    return entry;
  }

  bool is_contiguous(const std::vector<int64_t>& shape, const PickleValue& strides) const {
    if (strides.items.size() != shape.size()) return false;
    uint64_t expected = 1;
    for (size_t d = shape.size(); d-- > 0;) {
      const PickleValue& stride = pickle_.item(strides, d);
      const bool fits = stride.kind == Kind::kNumber && static_cast<uint64_t>(stride.number) == expected;
      if (shape[d] != 1 && !fits) return false;
      expected *= static_cast<uint64_t>(shape[d]);  // their product fits
    }
    return true;
  }

  // The id of a storage: ("storage", its type, the name of its member, its device, its number of elements).
  std::pair<const StorageType*, ZipMember> find_storage(const std::string& name, const PickleValue& value) const {
    const bool persistent = value.kind == Kind::kPersistent && pickle_.item(value, 0).kind == Kind::kTuple &&
                            pickle_.item(value, 0).items.size() == 5;
    check(persistent, name, "must have a storage");
    const PickleValue& id = pickle_.item(value, 0);
    const PickleValue &tag = pickle_.item(id, 0), &global = pickle_.item(id, 1), &key = pickle_.item(id, 2),
                      &count = pickle_.item(id, 4);
    const StorageType* type = nullptr;
    for (const StorageType& known : kStorageTypes) {
      if (global.kind == Kind::kGlobal && global.text == known.global) type = &known;
    }
    check(tag.text == "storage" && type != nullptr && key.kind == Kind::kText && count.kind == Kind::kNumber, name,
          "must have a storage");
    const auto member = members_.find(root_ + "data/" + std::string(key.text));
    check(member != members_.end(), name, "storage is missing in the archive");
    uint64_t bytes = 0;
    const bool whole = count.number >= 0 &&
                       !__builtin_mul_overflow(static_cast<uint64_t>(count.number), type->bytes, &bytes) &&
                       bytes == member->second.end - member->second.begin;
    check(whole, name, "storage must have the size that the pickle says");
    return {type, member->second};
  }

  const Pickle& pickle_;
  const Members& members_;
  const std::string& root_;
  const std::string& file_;
};

std::string read_member(const File& file, const std::string& name, const ZipMember& member) {
  if (member.end - member.begin > kMaxPickleBytes) throw LoadError(file.path(), name, "must have at most 4 MiB");
  std::string bytes(member.end - member.begin, '\0');
  file.read(member.begin, bytes.data(), bytes.size());
  return bytes;
}

void check_archive(const File& file) {
  std::string head(std::min<uint64_t>(file.size(), 4), '\0');
  file.read(0, head.data(), head.size());
  if (head == "PK\x03\x04") return;
  if (head.substr(0, 2) == "\x80\x02") {
    throw LoadError(file.path(), "",
                    "is in the format that torch.save had before torch 1.6; save it again: "
                    "torch.save(torch.load(FILE, weights_only=True), FILE)");
  }
  check_kind(file);
  throw LoadError(file.path(), "", "is no file of torch.save: it does not begin as a zip archive");
}

}  // namespace

TensorFile open_torch_pickle(const std::filesystem::path& path) {
  File file(path);
  check_archive(file);
  const Members members = read_zip_directory(file);
  const std::string suffix = "/data.pkl";
  std::optional<std::string> root;  // "archive/"
  for (const auto& [name, member] : members) {
    const size_t slash = name.find('/');
    if (slash != std::string::npos && name.substr(slash) == suffix) root = name.substr(0, slash + 1);
  }
  if (!root) throw LoadError(file.path(), "", "is a zip archive, but none of torch.save: data.pkl is missing");
  const auto order = members.find(*root + "byteorder");
  if (order != members.end() && read_member(file, order->first, order->second) != "little") {
    throw LoadError(file.path(), order->first, "must be little");
  }
  const std::string bytes = read_member(file, *root + "data.pkl", members.at(*root + "data.pkl"));
  const Pickle pickle = read_pickle(bytes, file.path(), known_globals());
  auto entries = StateDict(pickle, members, *root, file.path()).tensors();
  return TensorFile(std::move(file), std::move(entries));
}

}  // namespace mixtral
