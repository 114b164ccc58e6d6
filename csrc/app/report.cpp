#include "report.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <stdexcept>

#include "../io/printable.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {

std::string tokens_text(double tokens) {
  char text[32];
  std::snprintf(text, sizeof text, "%.0f tokens", tokens);
  return text;
}

std::string json_line(const nlohmann::json& value) {
  // The escapes of printable() are JSON's.
  return printable(value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)) + "\n";
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double per_second(int64_t count, double seconds) { return seconds > 0 ? static_cast<double>(count) / seconds : 0.0; }

double prefill_rate(const Timings& timings) {
  return per_second(timings.prompt_tokens - timings.cached_tokens, timings.prefill_seconds);
}

int64_t decoded_tokens(const Timings& timings, size_t sequences) {
  return std::max<int64_t>(0, timings.new_tokens - static_cast<int64_t>(sequences));
}

void print_stats(const Timings& timings, double load_seconds) {
  char cached[40] = "";
  if (timings.cached_tokens > 0)
    std::snprintf(cached, sizeof cached, " (%lld cached)", static_cast<long long>(timings.cached_tokens));
  char line[240];
  std::snprintf(
      line, sizeof line, "load %.2f s | prompt %lld tokens%s, %.1f tokens/s | %lld new tokens, %.1f tokens/s\n",
      load_seconds, static_cast<long long>(timings.prompt_tokens), cached, prefill_rate(timings),
      static_cast<long long>(timings.new_tokens), per_second(decoded_tokens(timings, 1), timings.decode_seconds));
  write_err(line);
}

void check_finished(const Generation& generation) {
  throw_if_terminated();
  if (generation.finish_reason == "error") throw std::runtime_error(generation.error);
}

}  // namespace mixtral::app
