// A thread that does what the engine's does with the callbacks of its requests, and times it; for bench_bridge.py.
#include <torch/extension.h>

#include <chrono>
#include <thread>

#include "../csrc/bindings/event_box.cpp"

namespace mixtral {

// A step each `interval` seconds. The text of its tokens is the time in nanoseconds, as of time.perf_counter_ns().
// -> seconds of each step.
std::vector<double> play(const std::shared_ptr<EventBox>& box, int64_t sequences, int64_t steps, double interval) {
  std::vector<Callbacks> callbacks;
  std::vector<Generation> generations(static_cast<size_t>(sequences));
  for (int64_t key = 0; key < sequences; ++key) callbacks.push_back(box->callbacks(key));
  std::vector<double> seconds;
  for (int64_t step = 0; step < steps; ++step) {
    std::this_thread::sleep_for(std::chrono::duration<double>(interval));
    const auto start = std::chrono::steady_clock::now();
    const std::string text = std::to_string(std::chrono::nanoseconds(start.time_since_epoch()).count()) + ' ';
    for (size_t i = 0; i < generations.size(); ++i) {
      generations[i].token_ids.push_back(step);
      callbacks[i].on_progress({text, generations[i], static_cast<size_t>(step)});
    }
    box->wake();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

}  // namespace mixtral

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace mixtral;
  py::class_<EventBox, std::shared_ptr<EventBox>>(m, "EventBox", py::module_local())
      .def(py::init<>())
      .def("fileno", &EventBox::fd)
      .def("take", [](EventBox& box) {
        py::list events;
        for (Event& event : box.take()) events.append(py::make_tuple(event.key, event.text, event.token_ids));
        return events;
      });
  m.def("play", &play, py::call_guard<py::gil_scoped_release>());
}
