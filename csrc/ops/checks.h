// Argument checks of the op layer. Every message reads `<op>: <argument> <expected>, got <actual>`.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mixtral {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error (RuntimeError in Python); the message is built only on failure.
#define MIXTRAL_CHECK(condition, ...)                                            \
  do {                                                                           \
    if (!(condition)) throw std::runtime_error(::mixtral::message(__VA_ARGS__)); \
  } while (false)

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape_string(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline bool is_float_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline bool is_index_type(ScalarType type) { return type == ScalarType::Int || type == ScalarType::Long; }

// `symbols` names the dimensions in the project's letters, e.g. "[T, H]".
inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank, const char* symbols) {
  MIXTRAL_CHECK(t.dim() == rank, op, ": ", name, " must have ", rank, " dimensions ", symbols, ", got shape ",
                shape_string(t));
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t expected) {
  MIXTRAL_CHECK(t.size(dim) == expected, op, ": ", name, " must have size ", expected, " in dimension ", dim,
                ", got shape ", shape_string(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  MIXTRAL_CHECK(t.scalar_type() == expected, op, ": ", name, " must be ", torch::headeronly::toString(expected),
                ", got ", torch::headeronly::toString(t.scalar_type()));
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  MIXTRAL_CHECK(is_float_type(t.scalar_type()), op, ": ", name, " must be Float, BFloat16 or Half, got ",
                torch::headeronly::toString(t.scalar_type()));
}

inline void check_index(const char* op, const char* name, const Tensor& t) {
  MIXTRAL_CHECK(is_index_type(t.scalar_type()), op, ": ", name, " must be Int or Long, got ",
                torch::headeronly::toString(t.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& reference) {
  MIXTRAL_CHECK(t.is_cuda() == reference.is_cuda() && t.get_device_index() == reference.get_device_index(), op, ": ",
                name, " must be on the device of the first argument (", reference.is_cuda() ? "cuda" : "cpu", "), got ",
                t.is_cuda() ? "cuda" : "cpu");
}

inline void check_window(const char* op, int64_t window) {
  MIXTRAL_CHECK(window >= 0, op, ": window must be >= 0 (0: no window), got ", window);
}

}  // namespace mixtral
