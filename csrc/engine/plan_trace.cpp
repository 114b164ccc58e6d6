#include "plan_trace.h"

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "../io/json.h"
#include "../io/load_error.h"

namespace mixtral {
namespace {

using nlohmann::json;

json describe(const std::vector<Scheduler::Chunk>& plan, const std::vector<Step>& steps) {
  json requests = json::array();
  for (const auto& [sequence, tokens] : plan) {
    json picked = json::array();
    for (const Step& step : steps)
      if (step.sequence == sequence)
        for (const Sample& sample : step.samples) picked.push_back(sample.token_id);
    requests.push_back({{"id", sequence->id}, {"tokens", tokens}, {"draft", sequence->draft}, {"picked", picked}});
  }
  return requests;
}

json ids_of(const json& requests) {
  json ids = json::array();
  for (const json& request : requests) ids.push_back(request.at("id"));
  return ids;
}

// The first, in words; empty: none. Throws json::exception where `there` lacks something.
std::string difference(const json& here, const json& there) {
  const auto unlike = [](const std::string& what, const json& a, const json& b) {
    return a == b ? "" : what + " " + a.dump() + " and not " + b.dump();
  };
  const json &requests = here.at("requests"), &expected = there.at("requests");
  std::string found = unlike("computes requests", ids_of(requests), ids_of(expected));
  for (size_t i = 0; found.empty() && i < requests.size(); ++i)
    for (const char* key : {"tokens", "draft", "picked"})
      if (found.empty())
        found = unlike("has for request " + requests[i].at("id").dump() + " as " + key, requests[i].at(key),
                       expected.at(i).at(key));
  return found.empty() ? unlike("comes after preemptions", here.at("preemptions"), there.at("preemptions")) : found;
}

}  // namespace

PlanTrace::PlanTrace(std::string file, Mode mode)
    : file_(std::move(file)), mode_(mode), stream_(file_, mode == Mode::kWrite ? std::ios::out : std::ios::in) {
  if (stream_) return;
  if (mode == Mode::kReplay) throw LoadError(file_, "", "cannot be read");
  throw std::runtime_error("plan trace: cannot write " + file_);
}

double PlanTrace::add(const std::vector<Scheduler::Chunk>& plan, int64_t preemptions, const std::vector<Step>& steps,
                      double seconds) {
  if (!difference_.empty()) throw std::runtime_error(difference_);
  const std::string pass = std::to_string(++passes_);
  const json here = {
      {"pass", passes_}, {"requests", describe(plan, steps)}, {"preemptions", preemptions}, {"seconds", seconds}};
  if (mode_ == Mode::kWrite) {
    stream_ << here.dump() << '\n';
    return seconds;
  }
  std::string line, found;
  if (!std::getline(stream_, line)) {
    found = "is one more than " + file_ + " has";
  } else {
    const json there = parse_json(line, file_);
    try {
      found = difference(here, there);
      seconds = there.at("seconds");
    } catch (const json::exception&) {
      throw LoadError(file_, "line " + pass, "is no pass of a plan trace");
    }
  }
  if (found.empty()) return seconds;
  difference_ = "plan replay: pass " + pass + " " + found;
  throw std::runtime_error(difference_);
}

void PlanTrace::finish() {
  if (!difference_.empty()) throw std::runtime_error(difference_);
  if (mode_ == Mode::kWrite) {
    if (!stream_.flush()) throw std::runtime_error("plan trace: cannot write " + file_);
  } else if (std::string line; std::getline(stream_, line)) {
    throw std::runtime_error("plan replay: there were " + std::to_string(passes_) + " passes, and " + file_ +
                             " has more");
  }
}

}  // namespace mixtral
