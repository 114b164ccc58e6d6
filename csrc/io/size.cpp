#include "size.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <stdexcept>

namespace mixtral {

int64_t parse_size(const std::string& text) {
  constexpr double kTooMuch = 9223372036854775808.0;  // 2^63
  double number = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, number, std::chars_format::fixed);
  std::string unit = end == last ? "b" : std::string(end, last);
  std::transform(unit.begin(), unit.end(), unit.begin(), [](unsigned char c) { return std::tolower(c); });
  const size_t power = std::string("bkmgt").find(unit[0]);
  const std::string rest = unit.substr(1);
  const bool is_unit = power != std::string::npos && (rest.empty() || (power > 0 && (rest == "b" || rest == "ib")));
  const double bytes = is_unit ? std::ldexp(number, static_cast<int>(10 * power)) : 0;
  if (error != std::errc() || !(bytes >= 1 && bytes < kTooMuch))
    throw std::invalid_argument("must be a size such as 4GiB, got " + text);
  return static_cast<int64_t>(bytes);
}

std::string bytes_text(double bytes) {
  static const char* const kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  for (; bytes >= 1024 && unit + 1 < std::size(kUnits); ++unit) bytes /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", bytes, kUnits[unit]);
  return text;
}

}  // namespace mixtral
