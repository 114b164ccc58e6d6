// Renders a parsed template, within limits: an endless or huge one ends in an error.
#pragma once

#include <map>
#include <string>

#include "parser.h"
#include "value.h"

namespace mixtral::jinja {

// The text that Jinja's ImmutableSandboxedEnvironment makes of the template, or an error: what is known is rendered
// exactly, everything else refused. Throws TemplateError, and TemplateRefusal where the template raises an exception.
std::string render(const Node& root, const std::map<std::string, Value>& variables);

}  // namespace mixtral::jinja
