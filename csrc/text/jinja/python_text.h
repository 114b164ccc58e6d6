// Text as Python's str treats it: by code points, with Unicode's white space. Bytes that are no UTF-8 count as one
// each.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mixtral::jinja {

bool starts_with_space(std::string_view text);

// str.strip(), lstrip(), rstrip(): of white space, or of the ASCII characters `of`.
std::string_view strip(std::string_view text, bool left = true, bool right = true,
                       std::optional<std::string_view> of = std::nullopt);

// The code points, each as text.
std::vector<std::string_view> characters(std::string_view text);

// str.split(): at white space, or at `separator`, which is not empty; at most `limit` times, if that is >= 0.
std::vector<std::string_view> split(std::string_view text, std::optional<std::string_view> separator, int64_t limit);

}  // namespace mixtral::jinja
