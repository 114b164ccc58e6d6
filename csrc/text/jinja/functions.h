// The filters, tests, methods and functions that templates may use.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "access.h"

namespace mixtral::jinja {

struct Arguments {
  std::vector<Value> values;
  std::vector<std::pair<std::string, Value>> named;
};

Value call_filter(const std::string& name, const Value& value, const Arguments& arguments, const Place& place);
bool call_test(const std::string& name, const Value& value, const std::vector<Value>& arguments, const Place& place);
Value call_method(const Value& value, const std::string& name, const Arguments& arguments, const Place& place);
// Whether Jinja or transformers defines a function of this name, which call_function() may know or not.
bool is_function(const std::string& name);
Value call_function(const std::string& name, const Arguments& arguments, const Place& place);

}  // namespace mixtral::jinja
