#include "render.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "error.h"
#include "functions.h"
#include "python_text.h"

namespace mixtral::jinja {
namespace {

using Scope = std::map<std::string, Value>;

class Renderer {
 public:
  explicit Renderer(const Scope& variables) : scopes_{variables} {}

  std::string run(const Node& root) {
    scopes_.emplace_back();
    execute(root);
    return std::move(out_);
  }

 private:
  enum class Flow { kNext, kBreak, kContinue };

  Place place(const Node& node) { return {node.line, budget_}; }

  // ---- statements

  Flow execute(const Node& node) {
    budget_.spend(1, node.line);
    switch (node.kind) {
      case Node::kText:
        print(*node.value.string(), node);
        return Flow::kNext;
      case Node::kPrint:
        print(to_text(evaluate(node.children[0]), place(node)), node);
        return Flow::kNext;
      case Node::kBlock:
        for (const Node& child : node.children) {
          const Flow flow = execute(child);
          if (flow != Flow::kNext) return flow;
        }
        return Flow::kNext;
      case Node::kIf:
        return execute(node.children[evaluate(node.children[0]).truth() ? 1 : 2]);
      case Node::kFor:
        return loop(node);
      case Node::kSet:
        set(node, evaluate(node.children[0]));
        return Flow::kNext;
      case Node::kSetBlock:
        set(node, captured(node.children[0]));
        return Flow::kNext;
      case Node::kScope:
        print(captured(node.children[0]), node);
        return Flow::kNext;
      case Node::kMacro:
        scopes_.back()[node.text] = callable();
        return Flow::kNext;
      case Node::kBreak:
        return Flow::kBreak;
      case Node::kContinue:
        return Flow::kContinue;
      default:
        throw TemplateError(node.line, "is no statement");
    }
  }

  void print(const std::string& text, const Node& node) {
    if (out_.size() + text.size() > Budget::kMaxBytes) place(node).fail("the result has more than 16 MiB");
    budget_.make(text.size(), node.line);
    out_ += text;
  }

  std::string captured(const Node& block) {
    std::string outer = std::exchange(out_, std::string());
    scopes_.emplace_back();
    execute(block);
    scopes_.pop_back();
    std::swap(out_, outer);
    return outer;
  }

  void set(const Node& node, Value value) {
    if (node.names.size() == 1) {
      scopes_.back()[node.names[0]] = std::move(value);
      return;
    }
    const Value target = variable(node.names[0]);
    const auto* space = std::get_if<std::shared_ptr<Namespace>>(&target);
    if (!space) place(node).fail(node.names[0] + " is no namespace");
    check_held(value, place(node));
    (*space)->fields[node.names[1]] = std::move(value);
  }

  // The variables of one turn of a loop over `each`.
  void bind(const Node& node, const Value& each) {
    if (node.names.size() == 1) {
      scopes_.back()[node.names[0]] = each;
      return;
    }
    const List parts = to_list(each, place(node));
    if (parts.size() != node.names.size()) place(node).fail("a loop's item has another number of parts than names");
    for (size_t i = 0; i < parts.size(); ++i) scopes_.back()[node.names[i]] = parts[i];
  }

  Flow loop(const Node& node) {
    List items;
    for (const Value& each : to_list(evaluate(node.children[0]), place(node))) {
      scopes_.emplace_back();
      bind(node, each);
      if (evaluate(node.children[1]).truth()) items.push_back(each);
      scopes_.pop_back();
    }
    bool reached_end = false;  // of the body, once: if not, the other block follows, also after break and continue
    const auto shared = std::make_shared<const List>(std::move(items));
    for (size_t i = 0; i < shared->size(); ++i) {
      scopes_.emplace_back();
      scopes_.back()["loop"] = Loop{shared, i};
      bind(node, (*shared)[i]);
      const Flow flow = execute(node.children[2]);
      scopes_.pop_back();
      if (flow == Flow::kBreak) break;
      reached_end = reached_end || flow == Flow::kNext;
    }
    return reached_end ? Flow::kNext : execute(node.children[3]);
  }

  // ---- expressions

  const Value* find_variable(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return &found->second;
    }
    return nullptr;
  }

  Value variable(const std::string& name) const {
    const Value* found = find_variable(name);
    if (found) return *found;
    return is_function(name) ? callable() : Value();
  }

  // A macro or a function that is not called: it is defined and true, and nothing else can be done with it.
  static Value callable() { return std::make_shared<Namespace>(); }

  Value evaluate(const Node& node) {
    budget_.spend(1, node.line);
    const auto child = [&](size_t i) { return evaluate(node.children[i]); };
    switch (node.kind) {
      case Node::kConstant:
        return node.value;
      case Node::kName:
        return variable(node.text);
      case Node::kList: {
        List list;
        for (const Node& each : node.children) {
          list.push_back(evaluate(each));
          check_held(list.back(), place(node));
        }
        return list;
      }
      case Node::kNot:
        return !child(0).truth();
      case Node::kNegative:
        return negative(child(0), place(node));
      case Node::kBinary:
        return binary(node);
      case Node::kConditional:
        return child(child(0).truth() ? 1 : 2);
      case Node::kAttribute:
        return attribute(child(0), node.text, place(node));
      case Node::kItem: {
        const Value object = child(0);
        return item(object, child(1), place(node));
      }
      case Node::kSlice:
        return slice(node);
      case Node::kCall:
        return call(node);
      case Node::kFilter: {
        const Value operand = child(0);
        return call_filter(node.text, operand, arguments(node), place(node));
      }
      case Node::kTest: {
        const Value operand = child(0);
        const Arguments given = arguments(node);
        if (!given.named.empty()) place(node).unsupported("a named argument of a test");
        return call_test(node.text, operand, given.values, place(node));
      }
      default:
        throw TemplateError(node.line, "is no expression");
    }
  }

  static Value negative(const Value& value, const Place& place) {
    if (!value.is_number()) place.fail(std::string("cannot negate ") + value.type_name());
    return -value.number();
  }

  Value binary(const Node& node) {
    const Place here = place(node);
    const std::string& sign = node.text;
    const Value left = evaluate(node.children[0]);
    if (sign == "and" || sign == "or") return left.truth() == (sign == "or") ? left : evaluate(node.children[1]);
    const Value right = evaluate(node.children[1]);
    if (sign == "==") return equal(left, right);
    if (sign == "!=") return !equal(left, right);
    if (sign == "in") return contains(right, left, here);
    if (sign == "not in") return !contains(right, left, here);
    if (sign == "~") return joined(to_text(left, here), to_text(right, here), here);
    if (sign == "+" && left.string() && right.string()) return joined(*left.string(), *right.string(), here);
    if (sign == "+" && left.list() && right.list()) {
      List list = to_list(left, here);
      for (const Value& each : to_list(right, here)) list.push_back(each);
      return list;
    }
    const bool compares = sign[0] == '<' || sign[0] == '>';
    if (left.is_number() && right.is_number()) {
      return compares ? ordered(sign, left.number(), right.number())
                      : arithmetic(sign, left.number(), right.number(), here);
    }
    if (compares && left.string() && right.string()) return ordered(sign, *left.string(), *right.string());
    here.fail(sign + " of " + left.type_name() + " and " + right.type_name());
  }

  static std::string joined(const std::string& left, const std::string& right, const Place& place) {
    place.budget.make(left.size() + right.size(), place.line);
    return left + right;
  }

  template <typename T>
  static Value ordered(const std::string& sign, const T& left, const T& right) {
    return sign == "<" ? left < right : sign == "<=" ? left <= right : sign == ">" ? left > right : left >= right;
  }

  // Python's: quotients are rounded down, a remainder has the sign of the divisor.
  static Value arithmetic(const std::string& sign, int64_t a, int64_t b, const Place& place) {
    constexpr int64_t kMost = int64_t{1} << 31;
    if (std::max(std::max(a, -a), std::max(b, -b)) > kMost) place.unsupported("arithmetic with such large numbers");
    if (sign == "+") return a + b;
    if (sign == "-") return a - b;
    if (sign == "*") return a * b;
    if (b == 0) place.fail("division by zero");
    const int64_t remainder = (a % b + b) % b;
    return sign == "%" ? remainder : (a - remainder) / b;
  }

  // object[begin:end:step], as of Python's lists.
  Value slice(const Node& node) {
    const Value object = evaluate(node.children[0]);
    if (!object.list() && !object.string()) place(node).unsupported(std::string("a slice of ") + object.type_name());
    const List items = to_list(object, place(node));
    const auto count = static_cast<int64_t>(items.size());
    const auto bound = [&](size_t index) -> std::optional<int64_t> {
      const Value value = index < node.children.size() ? evaluate(node.children[index]) : Value(None{});
      if (value.is_none()) return std::nullopt;
      if (!value.is_number()) place(node).fail(std::string("a slice by ") + value.type_name());
      return value.number();
    };
    const std::optional<int64_t> begin = bound(1), end = bound(2);
    const int64_t step = bound(3).value_or(1);
    if (step != 1 && step != -1) place(node).unsupported("this step of a slice");
    // Positions go from `first` to just before `last`, in the direction of the step.
    const int64_t low = step > 0 ? 0 : -1, high = step > 0 ? count : count - 1;
    const auto clamped = [&](int64_t i) { return std::clamp(i < 0 ? std::max(i, -count - 1) + count : i, low, high); };
    const int64_t first = begin ? clamped(*begin) : step > 0 ? low : high;
    const int64_t last = end ? clamped(*end) : step > 0 ? high : low;
    List list;
    for (int64_t i = first; step > 0 ? i < last : i > last; i += step) list.push_back(items[static_cast<size_t>(i)]);
    if (object.list()) return list;
    std::string text;
    for (const Value& each : list) text += *each.string();
    return text;
  }

  Arguments arguments(const Node& node) {
    Arguments given;
    for (size_t i = 1; i < node.children.size(); ++i) given.values.push_back(evaluate(node.children[i]));
    for (const auto& [name, value] : node.keywords) given.named.emplace_back(name, evaluate(value));
    return given;
  }

  Value call(const Node& node) {
    const Node& function = node.children[0];
    if (function.kind == Node::kAttribute) {
      const Value object = evaluate(function.children[0]);
      return call_method(object, function.text, arguments(node), place(node));
    }
    if (function.kind != Node::kName) place(node).unsupported("a call of an expression");
    if (find_variable(function.text)) place(node).unsupported("calling the macro " + function.text);
    return call_function(function.text, arguments(node), place(node));
  }

  std::vector<Scope> scopes_;  // the innermost last
  std::string out_;
  Budget budget_;
};

}  // namespace

std::string render(const Node& root, const std::map<std::string, Value>& variables) {
  return Renderer(variables).run(root);
}

}  // namespace mixtral::jinja
