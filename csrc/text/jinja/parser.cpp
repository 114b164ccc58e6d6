#include "parser.h"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <set>
#include <utility>

#include "error.h"
#include "lexer.h"

namespace mixtral::jinja {
namespace {

constexpr int kMaxDepth = 200;  // of expressions and blocks in each other

class Parser {
 public:
  explicit Parser(const std::string& source) : tokens_(tokenize(source)) {}

  Node run() {
    Node root = block({});
    if (token().kind != Token::kEnd) fail("unexpected tag " + token().text);
    return root;
  }

 private:
  // Counts the depth for as long as it lives.
  struct Deeper {
    explicit Deeper(Parser& parser) : depth(parser.depth_) {
      if (++depth > kMaxDepth) parser.fail("is nested too deeply");
    }
    ~Deeper() { --depth; }
    int& depth;
  };

  const Token& token(size_t ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  [[noreturn]] void fail(const std::string& reason) const { throw TemplateError(token().line, reason); }
  bool is(const char* text) const { return token().is(Token::kOperator, text); }
  bool is_word(const char* text) const { return token().is(Token::kName, text); }

  bool take(Token::Kind kind, const char* text) {
    if (!token().is(kind, text)) return false;
    ++at_;
    return true;
  }
  bool take(const char* text) { return take(Token::kOperator, text); }
  bool take_word(const char* text) { return take(Token::kName, text); }

  void expect(const char* text) {
    if (!take(text)) fail(std::string("expected ") + text + ", got " + shown());
  }
  void expect(Token::Kind kind, const char* what) {
    if (token().kind != kind) fail(std::string("expected ") + what + ", got " + shown());
    ++at_;
  }
  void end_tag() { expect(Token::kBlockEnd, "the end of the tag"); }
  std::string shown() const { return token().text.empty() ? "the end of the tag" : token().text; }

  std::string name() {
    const std::string text = token().text;
    expect(Token::kName, "a name");
    return text;
  }

  Node node(Node::Kind kind, std::vector<Node> children = {}, std::string text = "") const {
    Node result = {kind, token().line, 0, std::move(text), {}, std::move(children), {}, {}};
    for (const Node& child : result.children) rise_above(child, result);
    return result;
  }
  // The renderer and destructors go down a tree by recursion, also one that a long chain of operators made.
  void rise_above(const Node& child, Node& parent) const {
    parent.height = std::max(parent.height, child.height + 1);
    if (parent.height > kMaxDepth) fail("is nested too deeply");
  }
  void add(Node& parent, Node child) const {
    rise_above(child, parent);
    parent.children.push_back(std::move(child));
  }
  Node constant(Value value) const {
    Node result = node(Node::kConstant);
    result.value = std::move(value);
    return result;
  }

  // ---- statements

  // Up to a tag of one of these names, whose "{%" and name are read too; or to the end.
  Node block(const std::set<std::string>& ends) {
    const Deeper deeper(*this);
    Node result = node(Node::kBlock);
    for (; token().kind != Token::kEnd;) {
      if (token().kind == Token::kText) {
        Node text = node(Node::kText);
        text.value = token().text;
        ++at_;
        add(result, std::move(text));
      } else if (token().kind == Token::kPrintBegin) {
        ++at_;
        add(result, node(Node::kPrint, {expression()}));
        expect(Token::kPrintEnd, "}}");
      } else {
        ++at_;
        end_ = token().text;
        if (ends.count(end_) != 0) {
          ++at_;
          return result;
        }
        add(result, statement());
      }
    }
    if (!ends.empty()) fail("the template ends inside a block, before " + *ends.begin());
    return result;
  }

  // Behind "{%".
  Node statement() {
    const std::string tag = name();
    if (tag == "if") return if_statement();
    if (tag == "for") return for_statement();
    if (tag == "set") return set_statement();
    if (tag == "macro") return macro();
    if (tag == "generation") {
      end_tag();
      const int loops = std::exchange(loops_, 0);  // no way out of it
      Node body = block({"endgeneration"});
      loops_ = loops;
      end_tag();
      return node(Node::kScope, {std::move(body)});
    }
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) fail(tag + " outside a loop");
      Node result = node(tag == "break" ? Node::kBreak : Node::kContinue);
      end_tag();
      return result;
    }
    --at_;
    fail("the tag " + tag + " is not supported");
  }

  Node if_statement() {
    const Deeper deeper(*this);
    Node condition = either();
    end_tag();
    Node then = block({"elif", "else", "endif"});
    Node other = node(Node::kBlock);
    if (end_ == "elif") {
      add(other, if_statement());
    } else if (end_ == "else") {
      end_tag();
      other = block({"endif"});
      end_tag();
    } else {
      end_tag();
    }
    return node(Node::kIf, {std::move(condition), std::move(then), std::move(other)});
  }

  Node for_statement() {
    std::vector<std::string> names = {name()};
    while (take(",")) names.push_back(name());
    if (!take_word("in")) fail("expected in, got " + shown());
    Node iterable = either();
    Node filter = take_word("if") ? expression() : constant(true);
    if (is_word("recursive")) fail("a recursive loop is not supported");
    end_tag();
    ++loops_;
    Node body = block({"else", "endfor"});
    --loops_;
    Node other = node(Node::kBlock);
    if (end_ == "else") {
      end_tag();
      other = block({"endfor"});
    }
    end_tag();
    Node result = node(Node::kFor, {std::move(iterable), std::move(filter), std::move(body), std::move(other)});
    result.names = std::move(names);
    return result;
  }

  Node set_statement() {
    std::vector<std::string> names = {name()};
    if (take(".")) names.push_back(name());
    Node result = node(Node::kSet);
    if (take("=")) {
      add(result, expression());
    } else {
      result.kind = Node::kSetBlock;
      if (token().kind != Token::kBlockEnd) fail("this kind of set is not supported");
      end_tag();
      add(result, block({"endset"}));
    }
    end_tag();
    result.names = std::move(names);
    return result;
  }

  Node macro() {
    const std::string text = name();
    expect("(");
    while (!take(")")) {
      name();
      if (take("=")) expression();
      if (!is(")")) expect(",");
    }
    end_tag();
    const int loops = std::exchange(loops_, 0);
    block({"endmacro"});
    loops_ = loops;
    end_tag();
    return node(Node::kMacro, {}, text);
  }

  // ---- expressions, from the weakest binding to the strongest

  Node expression() {
    const Deeper deeper(*this);
    Node value = either();
    while (take_word("if")) {
      Node condition = either();
      Node other = take_word("else") ? expression() : constant(Undefined{});
      value = node(Node::kConditional, {std::move(condition), std::move(value), std::move(other)});
    }
    return value;
  }

  Node binary(std::string text, Node left, Node right) const {
    return node(Node::kBinary, {std::move(left), std::move(right)}, std::move(text));
  }

  Node either() {
    Node left = both();
    while (take_word("or")) left = binary("or", std::move(left), both());
    return left;
  }

  Node both() {
    Node left = negation();
    while (take_word("and")) left = binary("and", std::move(left), negation());
    return left;
  }

  Node negation() {
    const Deeper deeper(*this);
    if (take_word("not")) return node(Node::kNot, {negation()});
    return comparison();
  }

  std::string comparison_operator() {
    for (const char* text : {"==", "!=", "<=", ">=", "<", ">"}) {
      if (take(text)) return text;
    }
    if (take_word("in")) return "in";
    if (is_word("not") && token(1).is(Token::kName, "in")) {
      at_ += 2;
      return "not in";
    }
    return "";
  }

  Node comparison() {
    Node left = sum();
    const std::string text = comparison_operator();
    if (text.empty()) return left;
    left = binary(text, std::move(left), sum());
    if (!comparison_operator().empty()) fail("a chain of comparisons is not supported");
    return left;
  }

  std::string one_of(std::initializer_list<const char*> operators) {
    for (const char* text : operators) {
      if (take(text)) return text;
    }
    return "";
  }

  Node sum() {
    Node left = joined();
    for (std::string text; !(text = one_of({"+", "-"})).empty();) left = binary(text, std::move(left), joined());
    return left;
  }

  Node joined() {
    Node left = product();
    while (take("~")) left = binary("~", std::move(left), product());
    return left;
  }

  Node product() {
    Node left = unary();
    for (std::string text; !(text = one_of({"*", "//", "%"})).empty();) left = binary(text, std::move(left), unary());
    if (is("/") || is("**")) fail("the operator " + token().text + " is not supported");
    return left;
  }

  Node unary(bool with_filters = true) {
    const Deeper deeper(*this);
    Node value = take("-") ? node(Node::kNegative, {unary(false)}) : postfix(primary());
    return with_filters ? filters(std::move(value)) : value;
  }

  Node primary() {
    const Token first = token();
    if (first.kind == Token::kInteger) {
      ++at_;
      return constant(int64_t{std::stoll(first.text)});
    }
    if (first.kind == Token::kString) {
      std::string text;
      for (; token().kind == Token::kString; ++at_) text += token().text;
      return constant(std::move(text));
    }
    if (first.kind == Token::kName) {
      ++at_;
      if (first.text == "true" || first.text == "True") return constant(true);
      if (first.text == "false" || first.text == "False") return constant(false);
      if (first.text == "none" || first.text == "None") return constant(None{});
      return node(Node::kName, {}, first.text);
    }
    if (take("[")) return items("]", {});
    if (take("(")) {
      if (take(")")) return node(Node::kList);
      Node value = expression();
      if (take(",")) return items(")", std::move(value));
      expect(")");
      return value;
    }
    if (is("{")) fail("a dictionary in a template is not supported");
    fail("unexpected " + shown());
  }

  // Up to the closing bracket. Tuples count as lists.
  Node items(const char* close, std::optional<Node> first) {
    Node list = node(Node::kList);
    if (first) add(list, std::move(*first));
    while (!take(close)) {
      add(list, expression());
      if (!is(close)) expect(",");
    }
    return list;
  }

  void arguments(Node& call) {
    while (!take(")")) {
      if (token().kind == Token::kName && token(1).is(Token::kOperator, "=")) {
        const std::string key = name();
        expect("=");
        call.keywords.emplace_back(key, expression());
        rise_above(call.keywords.back().second, call);
      } else {
        if (!call.keywords.empty()) fail("an argument without a name after one with a name");
        add(call, expression());
      }
      if (!is(")")) expect(",");
    }
  }

  Node postfix(Node value) {
    for (;;) {
      if (take(".")) {
        value = node(Node::kAttribute, {std::move(value)}, name());
      } else if (take("[")) {
        value = subscript(std::move(value));
      } else if (take("(")) {
        value = node(Node::kCall, {std::move(value)});
        arguments(value);
      } else {
        return value;
      }
    }
  }

  Node subscript(Node value) {
    Node begin = is(":") ? constant(None{}) : expression();
    if (take("]")) return node(Node::kItem, {std::move(value), std::move(begin)});
    expect(":");
    Node end = is("]") || is(":") ? constant(None{}) : expression();
    std::vector<Node> parts = {std::move(value), std::move(begin), std::move(end)};
    if (take(":") && !is("]")) parts.push_back(expression());
    expect("]");
    return node(Node::kSlice, std::move(parts));
  }

  Node filters(Node value) {
    for (;;) {
      if (take("|")) {
        value = node(Node::kFilter, {std::move(value)}, name());
        if (take("(")) arguments(value);
      } else if (take_word("is")) {
        const bool negated = take_word("not");
        value = node(Node::kTest, {std::move(value)}, name());
        if (take("(")) {
          arguments(value);
        } else if (token().kind == Token::kString || token().kind == Token::kInteger || is("[")) {
          add(value, postfix(primary()));
        } else if (token().kind == Token::kName && !is_word("else") && !is_word("or") && !is_word("and")) {
          fail("a test with the argument " + token().text + " is not supported");
        }
        if (negated) value = node(Node::kNot, {std::move(value)});
      } else if (is("(")) {
        fail("a call here is not supported");
      } else {
        return value;
      }
    }
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::string end_;  // the tag that ended the last block
  int depth_ = 0;
  int loops_ = 0;  // around here
};

}  // namespace

Node parse(const std::string& source) { return Parser(source).run(); }

}  // namespace mixtral::jinja
