#include <torch/csrc/utils/pybind.h>

#include <string>

#include "../engine/engine.h"
#include "../engine/replays.h"
#include "bindings.h"
#include "event_box.h"

namespace mixtral {
namespace {

// Rows of [L,K] values as a tensor that owns them; None when there are none.
template <typename T>
std::optional<torch::Tensor> rows(const Event& event, const std::vector<T>& values, torch::ScalarType dtype) {
  if (values.empty()) return std::nullopt;
  const int64_t count = static_cast<int64_t>(values.size()) / (event.layers * event.top_k);
  return torch::from_blob(const_cast<T*>(values.data()), {count, event.layers, event.top_k}, dtype).clone();
}

int64_t submit(const std::shared_ptr<EventBox>& box, Engine& engine, Seat seat, int64_t key,
               std::vector<int64_t> prompt, SamplingParams params, int64_t experts_per_token, bool trace,
               bool constrained, const Replays* replays) {
  Request request;
  request.seat = std::move(seat);
  if (replays) request.replay = replays->find(prompt, experts_per_token);
  request.prompt_token_ids = std::move(prompt);
  request.params = std::move(params);
  request.experts_per_token = experts_per_token;
  request.trace = trace;
  request.constrained = constrained;
  return engine.submit(std::move(request), box->callbacks(key));
}

}  // namespace

void bind_events(py::module_& m) {
  py::class_<Event>(m, "Event", "What happened to one request since the box was emptied.")
      .def_readonly("key", &Event::key)
      .def_readonly("text", &Event::text, "That became certain; may be empty.")
      .def_readonly("token_ids", &Event::token_ids)
      .def_readonly("logprobs", &Event::logprobs, "[TokenLogprob], one per token when asked for.")
      .def_readonly("prompt_logprobs", &Event::prompt_logprobs, "Those of the prompt, beside the first new token.")
      .def_property_readonly(
          "routed_experts", [](const Event& event) { return rows(event, event.routed_ids, torch::kUInt8); },
          "uint8 [rows, L, K] of the tokens that the model read meanwhile; None when there are none.")
      .def_property_readonly(
          "routed_weights", [](const Event& event) { return rows(event, event.routed_weights, torch::kFloat16); },
          "float16 [rows, L, K]: the weights of these experts.")
      .def_property_readonly(
          "outcome", [](const Event& event) { return event.outcome.get(); },
          py::return_value_policy::reference_internal, "The Outcome; None while the request runs.");
  py::class_<EventBox, std::shared_ptr<EventBox>>(m, "EventBox", "The events of many requests, for an event loop.")
      .def(py::init<>())
      .def("fileno", &EventBox::fd, "Readable while there are events to take.")
      .def("take", &EventBox::take, "-> [Event], at most one of a request. Empties the box.")
      .def(
          "attach",
          [](const std::shared_ptr<EventBox>& box, Engine& engine) {
            engine.after_passes([weak = std::weak_ptr<EventBox>(box)] {
              const auto attached = weak.lock();
              if (attached) attached->wake();
              return attached != nullptr;
            });
          },
          py::arg("engine"), ReleaseGil(),
          "The engine wakes the box's reader after each pass, as long as there is the box.")
      .def("submit", &submit, py::arg("engine"), py::arg("seat"), py::arg("key"), py::arg("prompt"), py::arg("params"),
           py::arg("experts_per_token") = 0, py::arg("trace") = false, py::arg("constrained") = false,
           py::arg("replays") = nullptr, ReleaseGil(),
           "-> the request's id, for Engine.cancel and Engine.allow. Raises ValueError, QueueFull.");
}

}  // namespace mixtral
