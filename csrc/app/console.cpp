#include "console.h"

#include <mixtral/mixtral.h>
#include <sys/time.h>
#include <unistd.h>

#include <CLI/Error.hpp>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <new>
#include <system_error>

namespace mixtral::app {
namespace {

std::atomic<int> pending_signal{0};
std::atomic<bool> interactive{false};

int fail(int code, const char* message) noexcept {
  // One line: torch puts a backtrace behind the first.
  const size_t length = std::strcspn(message, "\n");
  std::fprintf(stderr, "mixtral: %.*s\n", static_cast<int>(length), message);
  return code;
}

bool means_no_memory(const std::error_code& code) {
  return code == std::errc::not_enough_memory || code == std::errc::resource_unavailable_try_again;
}

// Also reached from the static initialisers of libraries, before main.
[[noreturn]] void on_terminate() noexcept {
  int code = kRunTime;
  try {
    if (const std::exception_ptr exception = std::current_exception()) std::rethrow_exception(exception);
    fail(code, "internal error");
  } catch (...) {
    code = report_exception();
  }
  _exit(code);
}

extern "C" void on_signal(int signal) {
  const int saved_errno = errno;
  const bool second = pending_signal.exchange(signal) != 0;
  const bool stops_answer = interactive && signal == SIGINT;
  if (second) _exit(stops_answer ? kOk : kSignalBase + signal);
  if (!stops_answer) {
    itimerval deadline = {};
    deadline.it_value.tv_usec = 800'000;
    setitimer(ITIMER_REAL, &deadline, nullptr);
  }
  errno = saved_errno;
}

extern "C" void on_deadline(int) { _exit(kSignalBase + pending_signal); }

// libgomp has no other way to say that it could not start a thread; this program itself never exits with 1.
void on_library_exit(int status, void*) {
  if (status == EXIT_FAILURE) _exit(kOutOfMemory);
}

// An exception in a static initialiser of libtorch (no memory) must not abort either, so the handler is set before
// them.
void set_terminate_early(int, char**, char**) { std::set_terminate(on_terminate); }
__attribute__((section(".preinit_array"), used)) void (*const early)(int, char**, char**) = set_terminate_early;

}  // namespace

int report_exception() noexcept {
  try {
    throw;
  } catch (const OutputClosed&) {
    return kOk;
  } catch (const Interrupted& e) {
    return fail(kSignalBase + pending_signal, e.what());
  } catch (const LoadError& e) {
    return fail(kBadModel, e.what());
  } catch (const std::bad_alloc&) {
    return fail(kOutOfMemory, "out of memory");
  } catch (const OutOfMemory& e) {
    return fail(kOutOfMemory, e.what());
  } catch (const c10::OutOfMemoryError& e) {
    return fail(kOutOfMemory, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    // The CPU allocator of torch throws a plain c10::Error.
    const char* message = e.what_without_backtrace();
    return fail(std::strstr(message, "DefaultCPUAllocator") ? kOutOfMemory : kRunTime, message);
  } catch (const CLI::ParseError& e) {
    return fail(kUsage, e.what());
  } catch (const std::invalid_argument& e) {
    return fail(kUsage, e.what());
  } catch (const std::filesystem::filesystem_error& e) {
    return fail(kBadModel, e.what());
  } catch (const std::system_error& e) {
    if (means_no_memory(e.code())) return fail(kOutOfMemory, "out of memory, or no more threads can be started");
    return fail(kRunTime, e.what());
  } catch (const std::exception& e) {
    return fail(kRunTime, e.what());
  } catch (...) {
    return fail(kRunTime, "internal error");
  }
}

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

bool stdout_is_terminal() { return isatty(STDOUT_FILENO) == 1; }
bool stderr_is_terminal() { return isatty(STDERR_FILENO) == 1; }
bool stdin_is_terminal() { return isatty(STDIN_FILENO) == 1; }

void install_handlers() {
  on_exit(on_library_exit, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  struct sigaction action = {};
  sigemptyset(&action.sa_mask);
  action.sa_handler = on_signal;  // no SA_RESTART: a blocking read must come back
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  action.sa_handler = on_deadline;
  sigaction(SIGALRM, &action, nullptr);
}

void make_sigint_stop_the_answer() { interactive = true; }

bool signalled() { return pending_signal != 0; }

void throw_if_terminated() {
  const int signal = pending_signal;
  if (signal != 0 && !(interactive && signal == SIGINT)) throw Interrupted();
}

void forget_sigint() {
  int expected = SIGINT;
  pending_signal.compare_exchange_strong(expected, 0);
}

std::string bytes_text(double bytes) {
  static const char* const kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  for (; bytes >= 1024 && unit + 1 < std::size(kUnits); ++unit) bytes /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", bytes, kUnits[unit]);
  return text;
}

std::string tokens_text(double tokens) {
  char text[32];
  std::snprintf(text, sizeof text, "%.0f tokens", tokens);
  return text;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
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

}  // namespace mixtral::app
