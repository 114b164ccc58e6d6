// The engine without its thread: admits requests, runs one forward pass at a time, hands out text and results.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model_runner.h"
#include "scheduler.h"
#include "sequence.h"
#include "session_file.h"
#include "sessions.h"
#include "speculator.h"

namespace mixtral {

// Used by one thread. No method throws because of a request: what goes wrong with one ends that request.
class EngineCore {
 public:
  // At most max_batch idle sessions are kept.
  EngineCore(Mixtral model, const ModelRunner::Options& runner, const Scheduler::Options& scheduler);

  void add(std::unique_ptr<Sequence> sequence);
  void cancel(int64_t id);                            // does nothing if no request has this id
  void allow(int64_t id, std::vector<int32_t> mask);  // of the next token of a constrained request, if there is one
  bool idle() const;                                  // there is nothing to do until one of these calls comes
  // The tokens, keys and values of an idle session. Throws std::invalid_argument when there is none of this name.
  SavedSession save_session(const std::string& name);
  // Makes an idle session of them, in the place of one of this name. Throws OutOfMemory.
  void load_session(const std::string& name, SavedSession saved);
  // Admits requests that fit and runs one forward pass.
  void step();
  void cancel_all();
  void fail_all(const std::exception_ptr& error);

  // Called by the thread after each pass and the callbacks that came of it: one wake-up for all of them.
  std::function<void()> after_pass;

 private:
  void admit();
  bool make_room(const Sequence& next);
  void start(Sequence& sequence);
  void sample_held();
  void run_pass();
  void take(const Step& step);
  void show(Sequence& sequence, const std::string& text);
  void end_finished();
  void end(Sequence& sequence) noexcept;
  void keep_session(Sequence& sequence);
  int64_t idle_pages_but(const std::string& session);
  bool drop(const std::optional<Session>& session);
  void add_session(Session session);

  ModelRunner runner_;
  Scheduler scheduler_;
  Speculator speculator_;
  Sessions sessions_;
  size_t max_sessions_;
  std::vector<std::unique_ptr<Sequence>> sequences_;  // waiting and running, in the order of arrival
  bool may_admit_ = false;                            // something changed since the last admission
};

}  // namespace mixtral
