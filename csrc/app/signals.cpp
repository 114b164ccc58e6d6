#include "signals.h"

#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>

#include "errors.h"

namespace mixtral::app {
namespace {

std::atomic<int> pending{0};
std::atomic<bool> interactive{false};

extern "C" void on_signal(int signal) {
  const int saved_errno = errno;
  const bool second = pending.exchange(signal) != 0;
  const bool stops_answer = interactive && signal == SIGINT;
  if (second) _exit(stops_answer ? kOk : kSignalBase + signal);
  if (!stops_answer) {
    itimerval deadline = {};
    deadline.it_value.tv_usec = 800'000;
    setitimer(ITIMER_REAL, &deadline, nullptr);
  }
  errno = saved_errno;
}

extern "C" void on_bus_error(int) {
  constexpr char kMessage[] =
      "mixtral: a weight file was cut short, or its disk failed, while the model was using it (--weights mmap)\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, kMessage, sizeof kMessage - 1);
  _exit(kBadModel);
}

extern "C" void on_deadline(int) { _exit(kSignalBase + pending); }

}  // namespace

void install_signal_handlers() {
  std::signal(SIGPIPE, SIG_IGN);
  struct sigaction action = {};
  sigemptyset(&action.sa_mask);
  action.sa_handler = on_signal;  // no SA_RESTART: a blocking read must come back
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  action.sa_handler = on_deadline;
  sigaction(SIGALRM, &action, nullptr);
}

void ignore_sigint() { std::signal(SIGINT, SIG_IGN); }

void install_bus_error_handler() {
  struct sigaction action = {};
  sigemptyset(&action.sa_mask);
  action.sa_handler = on_bus_error;
  sigaction(SIGBUS, &action, nullptr);
}

void make_sigint_stop_the_answer() { interactive = true; }

int pending_signal() { return pending; }

void throw_if_terminated() {
  const int signal = pending;
  if (signal != 0 && !(interactive && signal == SIGINT)) throw Interrupted();
}

void forget_sigint() {
  int expected = SIGINT;
  pending.compare_exchange_strong(expected, 0);
}

}  // namespace mixtral::app
