// SIGINT and SIGTERM.
#pragma once

#include <stdexcept>

namespace mixtral::app {

// SIGINT or SIGTERM has come.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// After SIGINT or SIGTERM the process ends with 128 + signal: by itself at the next look, else by force 0.8 s later.
void install_signal_handlers();
// Of a rank that follows another one: Ctrl-C on a terminal reaches all of them, and the first one ends the others.
void ignore_sigint();
// In an interactive chat SIGINT only stops the answer; a second one leaves with 0.
void make_sigint_stop_the_answer();
// A mapped file that is cut short while it is in use ends the process with a message and kBadModel.
void install_bus_error_handler();
int pending_signal();        // 0: none
void throw_if_terminated();  // by anything but the SIGINT of an interactive chat
void forget_sigint();

}  // namespace mixtral::app
