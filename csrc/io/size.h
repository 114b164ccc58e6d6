// Amounts of memory as text.
#pragma once

#include <cstdint>
#include <string>

namespace mixtral {

// "4GiB", "1.5g", "512MB", "64k" or "123" -> bytes, at least one. The units are powers of 1024, however they are
// written. Throws std::invalid_argument: "must be a size such as 4GiB, got much".
int64_t parse_size(const std::string& text);

std::string bytes_text(double bytes);  // "1.50 GiB"

}  // namespace mixtral
