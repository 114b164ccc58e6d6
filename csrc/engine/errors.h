// What went wrong, for code that includes no torch header.
#pragma once

#include <exception>
#include <optional>

namespace mixtral {

struct TorchError {
  bool out_of_memory;
  const char* message;  // without torch's backtrace; lives as long as the exception
};

// None when torch did not throw `error`.
std::optional<TorchError> torch_error(const std::exception& error) noexcept;

// Of the host or of a device, whoever ran out of it.
bool is_out_of_memory(const std::exception& error) noexcept;

}  // namespace mixtral
