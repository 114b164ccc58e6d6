#include "terminal.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <system_error>

#include "signals.h"

namespace mixtral::app {
namespace {

std::string read_all(int fd, const std::string& name) {
  std::string text;
  char buffer[65536];
  for (;;) {
    const ssize_t count = ::read(fd, buffer, sizeof buffer);
    if (count == 0) return text;
    throw_if_terminated();
    if (count > 0) {
      text.append(buffer, static_cast<size_t>(count));
    } else if (errno != EINTR) {
      throw std::invalid_argument("cannot read " + name + ": " + std::generic_category().message(errno));
    }
  }
}

}  // namespace

void write_out(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(STDOUT_FILENO, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<size_t>(written));
    } else if (errno == EPIPE) {
      throw OutputClosed();
    } else if (errno != EINTR) {
      throw std::system_error(errno, std::generic_category(), "cannot write to stdout");
    } else {
      throw_if_terminated();
    }
  }
}

void write_err(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stderr); }

void write_no_errors() {
  const int nothing = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
  if (nothing < 0) return;
  ::dup2(nothing, STDERR_FILENO);
  ::close(nothing);
}

bool stdout_is_terminal() { return isatty(STDOUT_FILENO) == 1; }
bool stderr_is_terminal() { return isatty(STDERR_FILENO) == 1; }
bool stdin_is_terminal() { return isatty(STDIN_FILENO) == 1; }

std::string read_file(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) throw std::invalid_argument("cannot open " + path + ": " + std::generic_category().message(errno));
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> closer(file, std::fclose);
  return plain_text(read_all(fileno(file), path), path);
}

std::string read_stdin() { return plain_text(read_all(STDIN_FILENO, "stdin"), "stdin"); }

std::string plain_text(std::string bytes, const std::string& name) {
  const auto begins_with = [&bytes](std::string_view mark) { return bytes.compare(0, mark.size(), mark) == 0; };
  if (begins_with("\xff\xfe") || begins_with("\xfe\xff")) {
    throw std::invalid_argument(name + " is UTF-16: save it as UTF-8");
  }
  if (begins_with("\xef\xbb\xbf")) bytes.erase(0, 3);
  std::string text;
  text.reserve(bytes.size());
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] != '\r' || i + 1 == bytes.size() || bytes[i + 1] != '\n') text += bytes[i];
  }
  return text;
}

std::string unescape(const std::string& text) {
  static constexpr std::string_view kLetters = "ntr\\\"", kCharacters = "\n\t\r\\\"";
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const size_t letter = text[i] == '\\' && i + 1 < text.size() ? kLetters.find(text[i + 1]) : std::string_view::npos;
    if (letter == std::string_view::npos) {
      out += text[i];
    } else {
      out += kCharacters[letter];
      ++i;
    }
  }
  return out;
}

ProgressBar::~ProgressBar() {
  if (shown_) write_err("\r\x1b[K");
}

void ProgressBar::update(double done, double total) {
  const double now = seconds_now();
  if (!stderr_is_terminal() || total == 0 || now - start_ < 0.5 || now - last_ < 0.1) return;
  last_ = now;
  shown_ = true;
  const double share = done / total;
  const std::string bar(static_cast<size_t>(30 * share), '#');
  char line[160];
  std::snprintf(line, sizeof line, "\r%s [%-30s] %3.0f%% of %s, %s/s\x1b[K", label_.c_str(), bar.c_str(), 100 * share,
                amount_(total).c_str(), amount_(done / (now - start_)).c_str());
  write_err(line);
}

std::function<void(int64_t done, int64_t total)> progress_on(ProgressBar& bar) {
  return [&bar](int64_t done, int64_t total) {
    throw_if_terminated();
    bar.update(static_cast<double>(done), static_cast<double>(total));
  };
}

}  // namespace mixtral::app
