// An exception that nobody catches ends the program with one line and an exit code, not with abort() and a core dump.
//
// The static initialisers of libtorch may throw too (no memory). They run before main and before the initialisers of
// this program, so the handler is set in .preinit_array, which the dynamic loader runs before all of them.
#include <unistd.h>

#include <exception>

#include "errors.h"

namespace mixtral::app {
namespace {

[[noreturn]] void on_terminate() noexcept {
  int code = kRunTime;
  try {
    if (const std::exception_ptr exception = std::current_exception()) std::rethrow_exception(exception);
    throw "no exception";  // std::terminate was called without one: an internal error
  } catch (...) {
    code = report_exception();
  }
  _exit(code);
}

void set_terminate_early(int, char**, char**) { std::set_terminate(on_terminate); }
__attribute__((section(".preinit_array"), used)) void (*const early)(int, char**, char**) = set_terminate_early;

}  // namespace
}  // namespace mixtral::app
