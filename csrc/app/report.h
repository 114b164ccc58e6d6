// Results and quantities as text and JSON.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "../engine/request.h"
#include "../io/size.h"

namespace mixtral::app {

std::string tokens_text(double tokens);  // "1500 tokens"
std::string json_line(const nlohmann::json& value);

double seconds_now();  // of a monotonic clock
double per_second(int64_t count, double seconds);
double prefill_rate(const Timings& timings);                       // computed prompt tokens per second
int64_t decoded_tokens(const Timings& timings, size_t sequences);  // the first token of each comes from the prefill
void print_stats(const Timings& timings, double load_seconds);     // one line on stderr

// Throws when generation was interrupted or `generation` ended in an error.
void check_finished(const Generation& generation);

}  // namespace mixtral::app
