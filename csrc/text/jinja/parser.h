// A Jinja template as a tree: the part of the language that chat templates use.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "value.h"

namespace mixtral::jinja {

struct Node {
  enum Kind {
    // Expressions, and what `children` are. Arguments of calls, filters and tests come last.
    kConstant,     // none; `value`
    kName,         // none; `text`: the variable
    kList,         // the items
    kNot,          // operand
    kNegative,     // operand
    kBinary,       // left, right; `text`: the operator, one of + - * // % ~ and or == != < <= > >= in "not in"
    kConditional,  // condition, value, other value
    kAttribute,    // object; `text`: the name after the dot
    kItem,         // object, key
    kSlice,        // object, begin, end; an absent one is a constant none
    kCall,         // function, arguments
    kFilter,       // operand, arguments; `text`: the filter
    kTest,         // operand, arguments; `text`: the test
    // Statements
    kText,      // none; `value`
    kPrint,     // expression
    kBlock,     // statements
    kIf,        // condition, block, other block
    kFor,       // iterable, filter (a constant true if absent), block, block for no item; `names`
    kSet,       // expression; `names`: the variable, or a namespace and its field
    kSetBlock,  // block; `names`
    kScope,     // block whose variables end with it
    kMacro,     // none; `text`: the name
    kBreak,
    kContinue,
  };

  Kind kind;
  int line;
  int height;  // of the tree below
  std::string text;
  Value value;
  std::vector<Node> children;
  std::vector<std::string> names;
  std::vector<std::pair<std::string, Node>> keywords;  // named arguments
};

// Throws TemplateError for what is no Jinja, and for what the renderer does not know: macros are read, not called.
Node parse(const std::string& source);

}  // namespace mixtral::jinja
