// How long ranks wait for each other.
#pragma once

#include <cstdio>
#include <string>

namespace mixtral {

// For one that has not come yet, if the timeout is not longer: reading libraries alone may take seconds.
inline constexpr double kSecondsToStart = 60;

inline std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", seconds);
  return text;
}

}  // namespace mixtral
