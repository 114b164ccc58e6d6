#include "lexer.h"

#include <algorithm>
#include <string_view>

#include "error.h"
#include "python_text.h"

namespace mixtral::jinja {
namespace {

bool is_digit(char c) { return '0' <= c && c <= '9'; }
bool is_name_start(char c) { return ('a' <= c && c <= 'z') || ('A' <= c && c <= 'Z') || c == '_'; }
bool is_name(char c) { return is_name_start(c) || is_digit(c); }

// Line ends become "\n", and one at the very end goes, as Jinja's own lexer does it.
std::string normalized(const std::string& source) {
  std::string text;
  for (size_t i = 0; i < source.size(); ++i) {
    const bool pair = source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n';
    if (!pair) text += source[i] == '\r' ? '\n' : source[i];
  }
  if (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

class Lexer {
 public:
  explicit Lexer(const std::string& source) : source_(normalized(source)) {}

  std::vector<Token> run() {
    while (at_ < source_.size()) {
      const size_t tag = next_tag();
      text_until(tag);
      if (tag == source_.size()) break;
      at_ = tag + 2;
      if (at('-') || at('+')) ++at_;
      const char kind = source_[tag + 1];
      if (kind == '#') {
        skip_comment();
      } else {
        inside(kind == '%');
      }
    }
    push(Token::kEnd, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void fail(const std::string& reason) const { throw TemplateError(line_, reason); }
  bool at(char c) const { return at_ < source_.size() && source_[at_] == c; }
  bool at(std::string_view text) const { return std::string_view(source_).substr(at_, text.size()) == text; }
  void push(Token::Kind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }

  void advance(size_t end) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<std::ptrdiff_t>(at_),
                                         source_.begin() + static_cast<std::ptrdiff_t>(end), '\n'));
    at_ = end;
  }

  size_t next_tag() const {
    for (size_t i = at_; i + 1 < source_.size(); ++i) {
      if (source_[i] == '{' && (source_[i + 1] == '{' || source_[i + 1] == '%' || source_[i + 1] == '#')) return i;
    }
    return source_.size();
  }

  // The text before a tag. "{%-" takes all white space before it; "{%" alone on its line that of its line.
  void text_until(size_t tag) {
    std::string_view text = std::string_view(source_).substr(at_, tag - at_);
    if (tag < source_.size()) {
      const char sign = tag + 2 < source_.size() ? source_[tag + 2] : ' ';
      if (sign == '-') {
        text = strip(text, /*left=*/false, /*right=*/true);
      } else if (sign != '+' && source_[tag + 1] != '{') {
        const size_t line = text.rfind('\n') + 1;  // npos + 1 == 0
        if ((line > 0 || line_starts_) && strip(text.substr(line)).empty()) text = text.substr(0, line);
      }
    }
    if (!text.empty()) push(Token::kText, std::string(text));
    advance(tag);
  }

  // Behind a tag: "-%}" takes all white space after it, "%}" one line end, "}}" nothing.
  void close(bool strips, bool trims) {
    const size_t begin = at_;
    size_t end = at_;
    if (strips) {
      end = source_.size() - strip(std::string_view(source_).substr(at_), /*left=*/true, /*right=*/false).size();
    } else if (trims && at('\n')) {
      ++end;
    }
    advance(end);
    line_starts_ = end > begin && source_[end - 1] == '\n';
  }

  void skip_comment() {
    const size_t end = source_.find("#}", at_);
    if (end == std::string::npos) fail("a comment has no end");
    const char sign = end > at_ ? source_[end - 1] : ' ';
    advance(end + 2);
    close(sign == '-', sign != '+');
  }

  void inside(bool block) {
    push(block ? Token::kBlockBegin : Token::kPrintBegin, "");
    const std::string end = block ? "%}" : "}}";
    int depth = 0;  // of brackets: "}}" may end a dictionary
    for (;;) {
      while (at_ < source_.size() && starts_with_space(std::string_view(source_).substr(at_, 1))) advance(at_ + 1);
      if (at_ == source_.size()) fail("a tag has no end");
      if (depth == 0) {
        const bool signed_end = (at('-') || (at('+') && block)) && at(source_[at_] + end);
        if (signed_end || at(end)) {
          const char sign = signed_end ? source_[at_] : ' ';
          advance(at_ + end.size() + (signed_end ? 1 : 0));
          push(block ? Token::kBlockEnd : Token::kPrintEnd, "");
          return close(sign == '-', block && sign != '+');
        }
      }
      depth += expression_token();
    }
  }

  // Returns 1 behind an opening bracket, -1 behind a closing one.
  int expression_token() {
    const char c = source_[at_];
    if (c == '"' || c == '\'') {
      string(c);
    } else if (is_digit(c)) {
      number();
    } else if (is_name_start(c)) {
      const size_t begin = at_;
      while (at_ < source_.size() && is_name(source_[at_])) ++at_;
      push(Token::kName, source_.substr(begin, at_ - begin));
    } else {
      for (const char* text : {"==", "!=", ">=", "<=", "//", "**", "+", "-", "*", "/", "%", "~", "[",
                               "]",  "(",  ")",  "{",  "}",  ".",  ",", ":", "|", "=", "<", ">"}) {
        if (!at(text)) continue;
        push(Token::kOperator, text);
        at_ += tokens_.back().text.size();
        return c == '(' || c == '[' || c == '{' ? 1 : c == ')' || c == ']' || c == '}' ? -1 : 0;
      }
      const std::string_view character = characters(std::string_view(source_).substr(at_, 4)).front();
      fail("unexpected character " + std::string(character));
    }
    return 0;
  }

  void number() {
    const size_t begin = at_;
    while (at_ < source_.size() && is_digit(source_[at_])) ++at_;
    const std::string digits = source_.substr(begin, at_ - begin);
    const bool fraction = at('.') && at_ + 1 < source_.size() && is_digit(source_[at_ + 1]);
    const bool leading_zero = digits.size() > 1 && digits[0] == '0';
    if (fraction || leading_zero || digits.size() > 18 || (at_ < source_.size() && is_name_start(source_[at_]))) {
      fail("this kind of number is not supported");
    }
    push(Token::kInteger, digits);
  }

  void string(char quote) {
    const int line = line_;
    std::string text;
    for (++at_; !at(quote);) {
      if (at_ >= source_.size()) throw TemplateError(line, "a string has no end");
      if (at('\\')) {
        text += escape();
      } else {
        text += source_[at_];
        advance(at_ + 1);
      }
    }
    ++at_;
    tokens_.push_back({Token::kString, std::move(text), line});
  }

  char escape() {
    static constexpr std::string_view kNames = "nrt\\'\"", kCharacters = "\n\r\t\\'\"";
    const size_t which = at_ + 1 < source_.size() ? kNames.find(source_[at_ + 1]) : kNames.npos;
    if (which == kNames.npos) fail("this escape in a string is not supported");
    at_ += 2;
    return kCharacters[which];
  }

  const std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starts_ = true;  // at_ is right behind a line end, or at the start
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(const std::string& source) { return Lexer(source).run(); }

}  // namespace mixtral::jinja
