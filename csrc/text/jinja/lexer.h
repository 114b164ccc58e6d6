// The text of a Jinja template as tokens, with trim_blocks and lstrip_blocks, as transformers sets them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mixtral::jinja {

struct Token {
  enum Kind { kText, kBlockBegin, kBlockEnd, kPrintBegin, kPrintEnd, kName, kString, kInteger, kOperator, kEnd } kind;
  std::string text;  // of a string: without quotes and escapes
  int line;

  bool is(Kind other, const char* word) const { return kind == other && text == word; }
};

// Ends with a kEnd token. Throws TemplateError.
std::vector<Token> tokenize(const std::string& source);

}  // namespace mixtral::jinja
