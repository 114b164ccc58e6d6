// The one thread that runs forward passes, and the boxes through which requests and cancellations reach it.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "engine_core.h"

namespace mixtral {

class EngineThread {
 public:
  // The thread starts with the first request, or now where other ranks want pings.
  explicit EngineThread(std::unique_ptr<EngineCore> core);
  ~EngineThread() { stop(); }

  // Hands over requests, all at once. Throws the RankError that ended the engine; std::runtime_error after stop(), and
  // in a process that was forked after the thread had started: threads do not live on there.
  void submit(std::vector<std::unique_ptr<Sequence>> sequences);
  void cancel(const std::vector<int64_t>& ids);
  void allow(std::vector<std::pair<int64_t, std::vector<int32_t>>> masks);  // by id
  // Runs `task` on the thread, between two passes, and waits for it. Throws what it throws.
  void run(const std::function<void(EngineCore&)>& task);
  std::exception_ptr failure() const;  // the RankError that ended the engine, or null
  EngineStats stats() const;           // as of the last pass, or the last end of a request; not in a forked process
  // Cancels all requests and ends the thread.
  void stop();
  bool is_current() const;  // called on this thread, that is by a callback

 private:
  struct State;
  static void loop(State& state) noexcept;
  static bool iterate(State& state);
  bool was_forked() const;
  void check_process() const;
  void start();

  std::shared_ptr<State> state_;  // lives until the thread has ended
  std::thread thread_;
  std::atomic<pid_t> process_{0};  // that started the thread; 0 while there is none
};

}  // namespace mixtral
