// What is wrong with a template.
#pragma once

#include <stdexcept>
#include <string>

namespace mixtral::jinja {

// what(): "line 3: the filter tojson is not supported".
struct TemplateError : std::runtime_error {
  TemplateError(int line, const std::string& reason)
      : std::runtime_error("line " + std::to_string(line) + ": " + reason) {}
};

// The template itself called raise_exception(); what() is its text.
struct TemplateRefusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace mixtral::jinja
