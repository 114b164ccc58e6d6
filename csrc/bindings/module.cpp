#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  py::register_local_exception_translator(&mixtral::translate_exception);
  mixtral::bind_config(m);
  mixtral::bind_text(m);
  mixtral::bind_ranks(m);
  mixtral::bind_model(m);
  mixtral::bind_long_context(m);
  mixtral::bind_engine(m);
  mixtral::bind_events(m);
  mixtral::bind_trace(m);
}
