// mixtral._C: the C++ side for Python, one file per layer. Thin: values in, values out; the Python interface is
// python/mixtral/model.py.
//
// Calls that may take long run without the GIL. Errors keep their meaning: LoadError -> mixtral.LoadError,
// std::invalid_argument -> ValueError, std::out_of_range -> IndexError, out of memory -> MemoryError (errors.cpp).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <exception>
#include <string>

#include "../io/printable.h"

namespace py = pybind11;

namespace mixtral {

void bind_config(py::module_& m);
void bind_text(py::module_& m);
void bind_ranks(py::module_& m);
void bind_model(py::module_& m);
void bind_long_context(py::module_& m);
void bind_engine(py::module_& m);
void bind_events(py::module_& m);
void bind_trace(py::module_& m);
void translate_exception(std::exception_ptr pointer);

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// File names and pieces as stored need not be UTF-8.
inline py::str to_str(const std::string& text) {
  PyObject* str = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
  if (str == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(str);
}

// A Python warning at the caller's line, `level` frames up. Needs the GIL.
inline void warn(const std::string& message, int level = 1) {
  const std::string line = "mixtral: " + printable(message, 2048);
  if (PyErr_WarnEx(PyExc_UserWarning, line.c_str(), level) != 0) throw py::error_already_set();
}

// Keyword arguments to the fields of a bound struct.
template <typename Struct>
Struct from_kwargs(const py::kwargs& fields) {
  py::object result = py::cast(Struct());
  for (const auto& [name, value] : fields) {
    if (!py::hasattr(result, name)) {
      throw py::type_error(py::str("{}: unexpected argument {!r}").format(py::type::of(result).attr("__name__"), name));
    }
    try {
      result.attr(name) = value;
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      throw py::type_error(py::str("{}: not a value for this argument: {!r}").format(name, value));
    }
  }
  return result.cast<Struct>();
}

}  // namespace mixtral
