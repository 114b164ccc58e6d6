#include "pickle.h"

#include <algorithm>
#include <utility>

#include "byte_reader.h"
#include "utf8.h"

namespace mixtral {
namespace {

constexpr size_t kMaxValues = size_t{1} << 18;
constexpr size_t kMaxMarks = 1024;
constexpr uint32_t kUnset = 0xffffffff;
constexpr std::string_view kOrderedDict = "collections.OrderedDict";
const std::string kItem = "pickle";

// A pickle is a program for a machine with a stack and a memo. Marks remember where on the stack a collection begins.
class Machine {
 public:
  Machine(std::string_view bytes, const std::string& file, const std::set<std::string_view>& globals)
      : bytes_(bytes), reader_(bytes, file, kItem), globals_(globals) {}

  Pickle run() {
    if (reader_.number<uint8_t>() != 0x80 || reader_.number<uint8_t>() != 2) fail("must have protocol 2");
    for (char op = next(); op != '.'; op = next()) step(op);
    pickle_.root = pop();
    return std::move(pickle_);
  }

 private:
  using Kind = PickleValue::Kind;

  [[noreturn]] void fail(const std::string& reason) const { reader_.fail(reason); }
  char next() { return reader_.number<char>(); }

  void step(char op) {
    switch (op) {
      case 'N':  // None
        return push(Kind::kOther);
      case 'G':  // a float
        reader_.take(8);
        return push(Kind::kOther);
      case '\x88':
      case '\x89':
        return push_number(op == '\x88');
      case 'K':
        return push_number(reader_.number<uint8_t>());
      case 'M':
        return push_number(reader_.number<uint16_t>());
      case 'J':
        return push_number(reader_.number<int32_t>());
      case '\x8a':
        return push_long();
      case 'X':
        return push_text(Kind::kText, reader_.take(reader_.number<uint32_t>()));
      case 'c':
        return push_global();
      case ')':
        return push(Kind::kTuple);
      case ']':
        return push(Kind::kList);
      case '}':
        return push(Kind::kDict);
      case '(':
        if (marks_.size() == kMaxMarks) fail("is nested too deeply");
        return marks_.push_back(stack_.size());
      case 't':
        return push(Kind::kTuple, take_marked());
      case '\x85':
      case '\x86':
      case '\x87':
        return push(Kind::kTuple, take(static_cast<size_t>(op - '\x84')));
      case 'a':
        return add(Kind::kList, take(1));
      case 'e':
        return add(Kind::kList, take_marked());
      case 's':
        return add(Kind::kDict, take(2));
      case 'u':
        return add(Kind::kDict, take_marked());
      case 'q':
        return remember(reader_.number<uint8_t>());
      case 'r':
        return remember(reader_.number<uint32_t>());
      case 'h':
        return recall(reader_.number<uint8_t>());
      case 'j':
        return recall(reader_.number<uint32_t>());
      case 'Q':
        return push(Kind::kPersistent, take(1));
      case 'R':
        return call();
      case 'b':  // attributes of a dict, such as the _metadata of a state dict
        take(1);
        if (top().kind != Kind::kDict) fail("sets the attributes of something that is no dict");
        return;
      default:
        fail("has an opcode that a state dict does not need, at byte " + std::to_string(reader_.position() - 1));
    }
  }

  // ---- the stack

  void push(Kind kind, std::vector<uint32_t> items = {}) {
    if (pickle_.values.size() == kMaxValues) fail("must have at most 262144 values");
    stack_.push_back(static_cast<uint32_t>(pickle_.values.size()));
    PickleValue& value = pickle_.values.emplace_back();
    value.kind = kind;
    value.items = std::move(items);
  }

  void push_number(int64_t number) {
    push(Kind::kNumber);
    top().number = number;
  }

  void push_text(Kind kind, std::string_view text) {
    push(kind);
    top().text = text;
  }

  void push_long() {  // two's complement of any length, little-endian
    const std::string_view bytes = reader_.take(reader_.number<uint8_t>());
    if (bytes.size() > sizeof(int64_t)) fail("has a number that needs more than 64 bits");
    uint64_t number = !bytes.empty() && (bytes.back() & 0x80) != 0 ? ~uint64_t{0} : 0;
    for (size_t i = bytes.size(); i-- > 0;) number = number << 8 | static_cast<unsigned char>(bytes[i]);
    push_number(static_cast<int64_t>(number));
  }

  // "module\nname\n"
  void push_global() {
    const size_t begin = reader_.position(), middle = bytes_.find('\n', begin);
    const size_t end = middle == bytes_.npos ? middle : bytes_.find('\n', middle + 1);
    if (end == bytes_.npos) fail("ends early");
    const std::string_view text = reader_.take(end + 1 - begin);
    std::string name(text.substr(0, text.size() - 1));
    name[middle - begin] = '.';
    const auto known = globals_.find(name);
    if (known == globals_.end() && name != kOrderedDict) {
      fail("asks Python for " + (is_valid_utf8(name) ? name.substr(0, 100) : "something") +
           ", which is not part of a state dict; save the state dict alone: torch.save(model.state_dict(), FILE)");
    }
    push_text(Kind::kGlobal, known == globals_.end() ? kOrderedDict : *known);
  }

  void call() {
    const auto operands = take(2);
    const PickleValue &function = pickle_.at(operands[0]), &arguments = pickle_.at(operands[1]);
    if (function.kind != Kind::kGlobal || arguments.kind != Kind::kTuple) fail("has a call of no function");
    if (function.text == kOrderedDict) {
      if (!arguments.items.empty()) fail("has an OrderedDict in a form that torch.save does not write");
      return push(Kind::kDict);
    }
    std::vector<uint32_t> items = {operands[0]};
    items.insert(items.end(), arguments.items.begin(), arguments.items.end());
    push(Kind::kCall, std::move(items));
  }

  PickleValue& top() {
    if (stack_.empty()) fail("takes more values than there are");
    return pickle_.values[stack_.back()];
  }

  uint32_t pop() { return take(1)[0]; }

  // The topmost values, which must lie above the last mark.
  std::vector<uint32_t> take(size_t count) {
    const size_t floor = marks_.empty() ? 0 : marks_.back();
    if (count > stack_.size() - floor) fail("takes more values than there are");
    std::vector<uint32_t> taken(stack_.end() - static_cast<std::ptrdiff_t>(count), stack_.end());
    stack_.resize(stack_.size() - count);
    return taken;
  }

  std::vector<uint32_t> take_marked() {
    if (marks_.empty()) fail("takes more values than there are");
    auto taken = take(stack_.size() - marks_.back());
    marks_.pop_back();
    return taken;
  }

  void add(Kind kind, const std::vector<uint32_t>& items) {
    if (top().kind != kind || (kind == Kind::kDict && items.size() % 2 != 0)) fail("adds to something that is no dict");
    top().items.insert(top().items.end(), items.begin(), items.end());
  }

  // ---- the memo

  void remember(uint32_t index) {
    if (index >= kMaxValues) fail("must have at most 262144 values");
    if (index >= memo_.size()) memo_.resize(index + 1, kUnset);
    top();
    memo_[index] = stack_.back();
  }

  void recall(uint32_t index) {
    if (index >= memo_.size() || memo_[index] == kUnset) fail("uses a value that it did not keep");
    if (stack_.size() >= kMaxValues) fail("must have at most 262144 values");
    stack_.push_back(memo_[index]);
  }

  const std::string_view bytes_;
  ByteReader reader_;
  const std::set<std::string_view>& globals_;
  Pickle pickle_;
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;
  std::vector<uint32_t> memo_;
};

}  // namespace

Pickle read_pickle(std::string_view bytes, const std::string& file, const std::set<std::string_view>& globals) {
  return Machine(bytes, file, globals).run();
}

}  // namespace mixtral
