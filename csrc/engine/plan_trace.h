// What the engine did, pass by pass, in a file: and a second run that has to do the same.
//
// One JSON object a line, in the order in which passes are collected:
//   {"pass", "preemptions", "requests": [{"draft": [ids], "id", "picked": [ids], "tokens"}], "seconds"}
// tokens: that the pass computes, without the draft; picked: none while more of the prompt is to come, or the next
// token waits for its mask; preemptions: since the engine began.
//
// Plans depend on what is asked and on what is picked, and the length of a draft on how long passes took. So a replay
// learns from the seconds of the file.
#pragma once

#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "runner.h"

namespace mixtral {

class PlanTrace {
 public:
  enum class Mode { kWrite, kReplay };
  // Throws std::runtime_error when `file` cannot be written, LoadError when it cannot be read.
  PlanTrace(std::string file, Mode mode);

  // A pass that was collected. Returns how long it took; in a replay, as the file has it. There, throws
  // std::runtime_error that names the first difference; after one, every time.
  double add(const std::vector<Scheduler::Chunk>& plan, int64_t preemptions, const std::vector<Step>& steps,
             double seconds);
  // After the last pass. Throws std::runtime_error when the file could not be written, or has more passes.
  void finish();

 private:
  const std::string file_;
  const Mode mode_;
  std::fstream stream_;
  int64_t passes_ = 0;
  std::string difference_;  // the first; empty: none
};

}  // namespace mixtral
