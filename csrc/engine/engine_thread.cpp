#include "engine_thread.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <future>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "threads.h"

namespace mixtral {

namespace {

constexpr std::chrono::milliseconds kKeepsWorkers{20};  // for the next request of a caller that waits for each

}  // namespace

struct EngineThread::State {
  std::unique_ptr<EngineCore> core;  // used by the thread alone
  std::atomic<std::thread::id> thread_id{};
  std::mutex mutex;  // of everything below
  std::condition_variable changed;
  std::vector<std::unique_ptr<Sequence>> submitted;
  std::vector<int64_t> cancelled;                                 // ids
  std::vector<std::pair<int64_t, std::vector<int32_t>>> allowed;  // ids and masks
  std::vector<std::packaged_task<void(EngineCore&)>> tasks;
  bool stopping = false;
};

EngineThread::EngineThread(std::unique_ptr<EngineCore> core) : state_(std::make_shared<State>()) {
  state_->core = std::move(core);
  const std::lock_guard lock(state_->mutex);
  if (state_->core->ping_seconds() > 0) start();
}

// With the mutex held.
void EngineThread::start() {
  if (state_->stopping) throw std::runtime_error("Engine: stopped, it takes no more requests");
  if (thread_.joinable()) return;
  thread_ = std::thread([state = state_] { loop(*state); });
  process_ = ::getpid();
}

void EngineThread::submit(std::vector<std::unique_ptr<Sequence>> sequences) {
  check_process();
  if (!is_current()) release_idle_workers();  // the caller's
  if (const auto error = failure()) std::rethrow_exception(error);
  const std::lock_guard lock(state_->mutex);
  start();
  auto& submitted = state_->submitted;
  submitted.reserve(submitted.size() + sequences.size());  // all of them or none
  for (auto& sequence : sequences) submitted.push_back(std::move(sequence));
  state_->changed.notify_one();
}

void EngineThread::run(const std::function<void(EngineCore&)>& task) {
  check_process();
  if (is_current()) throw std::logic_error("Engine: a callback must not wait for the engine");
  std::future<void> done;
  {
    const std::lock_guard lock(state_->mutex);
    start();
    done = state_->tasks.emplace_back(task).get_future();
    state_->changed.notify_one();
  }
  done.get();
}

void EngineThread::cancel(const std::vector<int64_t>& ids) {
  if (was_forked()) return;
  const std::lock_guard lock(state_->mutex);
  state_->cancelled.insert(state_->cancelled.end(), ids.begin(), ids.end());
  state_->changed.notify_one();
}

std::exception_ptr EngineThread::failure() const { return state_->core->failure(); }

EngineStats EngineThread::stats() const {
  EngineStats stats = state_->core->published_stats();
  const std::lock_guard lock(state_->mutex);
  stats.waiting += static_cast<int64_t>(state_->submitted.size());
  return stats;
}

void EngineThread::allow(std::vector<std::pair<int64_t, std::vector<int32_t>>> masks) {
  if (was_forked()) return;
  const std::lock_guard lock(state_->mutex);
  for (auto& mask : masks) state_->allowed.push_back(std::move(mask));
  state_->changed.notify_one();
}

void EngineThread::stop() {
  if (was_forked()) {  // there is no thread to wait for, and whoever held the mutex is not here to release it
    if (thread_.joinable()) thread_.detach();
    new std::shared_ptr<State>(state_);  // never freed: the state is as the thread left it
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
    state_->changed.notify_one();
  }
  if (is_current()) {  // a callback drops the engine: the thread ends by itself
    thread_.detach();
  } else if (thread_.joinable()) {
    thread_.join();
  }
  process_ = 0;
}

void EngineThread::check_process() const {
  if (!was_forked()) return;
  throw std::runtime_error(
      "Engine: this process was forked from one that had used the model; load the model here, or start processes with "
      "the method \"spawn\"");
}

// Without the mutex, which a thread that is not here may hold.
bool EngineThread::was_forked() const {
  const pid_t process = process_;
  return process != 0 && process != ::getpid();
}

bool EngineThread::is_current() const { return state_->thread_id == std::this_thread::get_id(); }

void EngineThread::loop(State& state) noexcept {
  state.thread_id = std::this_thread::get_id();
  for (bool goes_on = true; goes_on;) {
    try {
      goes_on = iterate(state);
    } catch (...) {  // in no request's own work: out of memory, most likely
      state.core->fail_all(std::current_exception());
    }
    if (state.core->after_pass) state.core->after_pass();
  }
}

// Takes what is in the boxes and runs one step, or pings while there is nothing to do. Returns false when the thread is
// to end.
bool EngineThread::iterate(State& state) {
  std::vector<std::unique_ptr<Sequence>> submitted;
  std::vector<int64_t> cancelled;
  std::vector<std::pair<int64_t, std::vector<int32_t>>> allowed;
  std::vector<std::packaged_task<void(EngineCore&)>> tasks;
  bool stopping = false;
  {
    std::unique_lock lock(state.mutex);
    const auto has_work = [&] {
      return !state.core->idle() || !state.submitted.empty() || !state.cancelled.empty() || !state.allowed.empty() ||
             !state.tasks.empty() || state.stopping;
    };
    if (!state.changed.wait_for(lock, kKeepsWorkers, has_work)) {
      release_idle_workers();
      const std::chrono::duration<double> silence{state.core->ping_seconds()};
      if (silence.count() == 0) {
        state.changed.wait(lock, has_work);
      } else if (!state.changed.wait_for(lock, silence, has_work)) {
        lock.unlock();
        state.core->ping();
        return true;
      }
    }
    submitted.swap(state.submitted);
    cancelled.swap(state.cancelled);
    allowed.swap(state.allowed);
    tasks.swap(state.tasks);
    stopping = state.stopping;
  }
  const int threads = submitted.empty() ? 0 : submitted.back()->num_threads;
  for (auto& sequence : submitted) state.core->add(std::move(sequence));
  for (const int64_t id : cancelled) state.core->cancel(id);
  for (auto& [id, mask] : allowed) state.core->allow(id, std::move(mask));
  for (auto& task : tasks) task(*state.core);
  if (stopping) {
    state.core->cancel_all();
    return false;
  }
  if (threads > 0) use_threads(threads);  // where callers differ, the last one decides
  state.core->step();
  return true;
}

}  // namespace mixtral
