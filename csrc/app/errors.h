// Exit codes, and exceptions as one line on stderr.
#pragma once

namespace mixtral::app {

enum ExitCode { kOk = 0, kUsage = 2, kBadModel = 3, kOutOfMemory = 4, kRunTime = 5, kSignalBase = 128 };

// Call inside a catch block: writes one line about the exception to stderr and returns its exit code.
int report_exception() noexcept;

}  // namespace mixtral::app
