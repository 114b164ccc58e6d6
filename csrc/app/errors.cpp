#include "errors.h"

#include <CLI/Error.hpp>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <new>
#include <stdexcept>
#include <system_error>

#include "../engine/errors.h"
#include "../io/load_error.h"
#include "../io/printable.h"
#include "../model/memory.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

int fail(int code, const char* message) noexcept {
  const size_t length = std::strcspn(message, "\n");  // one line: torch's messages may have more
  try {
    std::fprintf(stderr, "mixtral: %s\n", printable({message, length}).c_str());
  } catch (const std::bad_alloc&) {
    std::fputs("mixtral: out of memory\n", stderr);
  }
  return code;
}

bool means_no_memory(const std::error_code& code) {
  return code == std::errc::not_enough_memory || code == std::errc::resource_unavailable_try_again;
}

}  // namespace

int report_exception() noexcept {
  try {
    throw;
  } catch (const OutputClosed&) {
    return kOk;
  } catch (const Interrupted& e) {
    return fail(kSignalBase + pending_signal(), e.what());
  } catch (const LoadError& e) {
    return fail(kBadModel, e.what());
  } catch (const std::bad_alloc&) {
    return fail(kOutOfMemory, "out of memory");
  } catch (const OutOfMemory& e) {
    return fail(kOutOfMemory, e.what());
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
    const auto torch = torch_error(e);
    if (torch) return fail(torch->out_of_memory ? kOutOfMemory : kRunTime, torch->message);
    return fail(kRunTime, e.what());
  } catch (...) {
    return fail(kRunTime, "internal error");
  }
}

}  // namespace mixtral::app
