#include "../engine/errors.h"

#include <c10/util/Exception.h>

#include "../distributed/communicator.h"
#include "../engine/request.h"
#include "../io/load_error.h"
#include "../model/memory.h"
#include "bindings.h"

namespace mixtral {
namespace {

void set_error(PyObject* type, const c10::Error& error) { PyErr_SetString(type, error.what_without_backtrace()); }

}  // namespace

void translate_exception(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const LoadError& e) {
    const py::object type = py::module_::import("mixtral.errors").attr("LoadError");
    const py::object value = type(to_str(e.what()), to_str(e.file()), to_str(e.item()), to_str(e.reason()));
    PyErr_SetObject(type.ptr(), value.ptr());
  } catch (const OutOfMemory& e) {
    PyErr_SetString(PyExc_MemoryError, e.what());
  } catch (const QueueFull& e) {
    PyErr_SetString(py::module_::import("mixtral.errors").attr("QueueFull").ptr(), e.what());
  } catch (const RankError& e) {
    const py::object type = py::module_::import("mixtral.errors").attr("RankError");
    PyErr_SetObject(type.ptr(), type(to_str(e.what()), e.rank).ptr());
  } catch (const c10::IndexError& e) {
    set_error(PyExc_IndexError, e);
  } catch (const c10::ValueError& e) {
    set_error(PyExc_ValueError, e);
  } catch (const c10::TypeError& e) {
    set_error(PyExc_TypeError, e);
  } catch (const c10::Error& e) {
    const auto error = torch_error(e);
    set_error(error && error->out_of_memory ? PyExc_MemoryError : PyExc_RuntimeError, e);
  }
}

}  // namespace mixtral
