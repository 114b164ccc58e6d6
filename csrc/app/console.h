// The binary's dealings with the outside: exit codes, stdout, signals, terminals.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace mixtral::app {

enum ExitCode { kOk = 0, kUsage = 2, kBadModel = 3, kOutOfMemory = 4, kRunTime = 5, kSignalBase = 128 };

// The reader of stdout has gone (`| head -1`): leave silently, with 0.
struct OutputClosed : std::runtime_error {
  OutputClosed() : std::runtime_error("stdout is closed") {}
};

// SIGINT or SIGTERM has come.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// Inside a catch block: one line on stderr about the exception in flight. Returns the exit code it deserves.
int report_exception() noexcept;

// Writes all of `text` to stdout at once. Throws OutputClosed or std::system_error.
void write_out(std::string_view text);
// Writes to stderr; errors are ignored, there is nobody left to tell.
void write_err(std::string_view text);
bool stdout_is_terminal();
bool stderr_is_terminal();
bool stdin_is_terminal();

// After SIGINT or SIGTERM the process ends with 128 + signal: by itself as soon as it looks, else by force 0.8 s later.
// The same goes for libraries that call exit(1) because a thread could not be made: that becomes kOutOfMemory.
void install_handlers();
// In an interactive chat SIGINT only stops the answer; a second one leaves with 0.
void make_sigint_stop_the_answer();
bool signalled();
void throw_if_terminated();  // by anything but the SIGINT of an interactive chat
void forget_sigint();

// "1.50 GiB"
std::string bytes_text(double bytes);
// "1500 tokens"
std::string tokens_text(double tokens);

double seconds_now();  // of a monotonic clock

// A bar on stderr that appears when the work takes more than half a second, and leaves no trace.
class ProgressBar {
 public:
  // `amount` writes a quantity with its unit.
  ProgressBar(std::string label, std::string (*amount)(double)) : label_(std::move(label)), amount_(amount) {}
  ~ProgressBar();
  void update(double done, double total);

 private:
  const std::string label_;
  std::string (*const amount_)(double);
  const double start_ = seconds_now();
  double last_ = 0;
  bool shown_ = false;
};

}  // namespace mixtral::app
