// Other programs: xz as a yardstick, Python for figures.
#pragma once

#include <string>
#include <vector>

namespace mixtral::app {

struct ChildResult {
  int status;          // exit status; 127 where there is no such program, 128 + signal where a signal ended it
  std::string output;  // what it wrote to stdout
};

// Runs a program, found as the shell finds it, with `input` as its stdin, and waits. Throws std::system_error where no
// process can be made, Interrupted after SIGINT or SIGTERM.
ChildResult run_child(const std::vector<std::string>& arguments, const std::string& input);

}  // namespace mixtral::app
