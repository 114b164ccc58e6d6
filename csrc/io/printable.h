// Text from a file or a command line, made safe to print.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace mixtral {

// One line of valid UTF-8 that commands no terminal and shows in the order it has: control characters, line and
// paragraph separators, and invisible and direction characters become "\u001b", bytes that are no UTF-8 "\xff".
// After about `max_bytes` bytes it ends in "...".
std::string printable(std::string_view text, size_t max_bytes = std::string::npos);

}  // namespace mixtral
