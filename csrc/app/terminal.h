// Reading files and stdin, writing stdout and stderr, and the progress bar.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "report.h"

namespace mixtral::app {

// The reader of stdout has gone (`| head -1`): the program leaves silently, with 0.
struct OutputClosed : std::runtime_error {
  OutputClosed() : std::runtime_error("stdout is closed") {}
};

// Writes all of `text` to stdout at once. Throws OutputClosed or std::system_error.
void write_out(std::string_view text);
// Writes to stderr. Errors are ignored: there is nobody left to tell.
void write_err(std::string_view text);
// From now on nothing comes out on stderr: somebody else says what goes wrong here.
void write_no_errors();
bool stdout_is_terminal();
bool stderr_is_terminal();
bool stdin_is_terminal();

// The text of a file, and that of stdin. Throw std::invalid_argument.
std::string read_file(const std::string& path);
std::string read_stdin();
// Text as editors on Windows save it, in the form that tokenizers know: no byte-order mark, and \n for \r\n. Throws
// std::invalid_argument for UTF-16; `name` says where the bytes come from.
std::string plain_text(std::string bytes, const std::string& name);
// \n, \t, \r, \\ and \" become the characters they stand for. Any other backslash stays.
std::string unescape(const std::string& text);

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

// Shows (done, total) of long work on `bar`, which must outlive it. Ends the work when the program is to end.
std::function<void(int64_t done, int64_t total)> progress_on(ProgressBar& bar);

}  // namespace mixtral::app
