#include "store.h"

#include <c10/util/Logging.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <utility>

#include "sockets.h"
#include "waiting.h"

namespace mixtral {
namespace {

constexpr int kLogErrors = 2;  // and no warnings
constexpr double kSecondsBetweenLooks = 0.01;
// What the ranks that also noticed are given to say for whom they wait.
constexpr double kSecondsOfGrace = 0.4;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
void sleep_seconds(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }
std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
}

}  // namespace

RankStore::RankStore(const Rendezvous& rendezvous)
    : rendezvous_(rendezvous), patience_(std::max(1.0, rendezvous.timeout)) {
  // A store that is gone is told by a RankError; c10d would add a trace of its stack.
  if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr)
    FLAGS_caffe2_log_level = std::max(FLAGS_caffe2_log_level, kLogErrors);
  c10d::TCPStoreOptions options;
  options.port = static_cast<std::uint16_t>(rendezvous.port);
  options.isServer = rendezvous.listener.has_value();
  options.masterListenFd = rendezvous.listener;
  options.waitWorkers = false;
  options.timeout = milliseconds(start_limit());
  const std::string where = rendezvous.address + ":" + std::to_string(rendezvous.port);
  if (!options.isServer && !answers(rendezvous.address, rendezvous.port, start_limit()))
    throw RankError(0, "did not answer at " + where + " within " + seconds_text(start_limit()));
  try {
    const auto store = c10::make_intrusive<c10d::TCPStore>(rendezvous.address, options);
    store_ = c10::make_intrusive<c10d::PrefixStore>(rendezvous.prefix, store);
  } catch (const c10::Error&) {
    throw RankError(0, "does not answer at " + where);
  }
  keep_alive();
}

RankStore::~RankStore() = default;

double RankStore::start_limit() const { return std::max(rendezvous_.timeout, kSecondsToStart); }

// What `question` answers about the store; none when that is gone, or does not answer: its process may be stopped, and
// the store's client would wait for ever. The thread then stays behind.
template <typename T>
std::optional<T> RankStore::ask(std::function<T(c10d::Store&)> question) noexcept {
  struct Answer {
    std::mutex mutex;
    std::condition_variable ready;
    std::optional<T> value;
    bool done = false;
  };
  if (is_lost_) return std::nullopt;
  try {
    const auto answer = std::make_shared<Answer>();
    std::thread([answer, store = store_, question = std::move(question)] {
      std::optional<T> value;
      try {
        value = question(*store);
      } catch (const std::exception&) {  // the connection is closed
      }
      const std::lock_guard lock(answer->mutex);
      answer->value = std::move(value);
      answer->done = true;
      answer->ready.notify_one();
    }).detach();
    std::unique_lock lock(answer->mutex);
    answer->ready.wait_for(lock, milliseconds(patience_), [&] { return answer->done; });
    is_lost_ = !answer->value.has_value();
    return answer->value;
  } catch (const std::exception&) {  // no thread, no memory
    return std::nullopt;
  }
}

void RankStore::set(const std::string& key, const std::string& value) noexcept {
  ask<bool>([=](c10d::Store& store) { return store.set(key, value), true; });
}

std::string RankStore::get(const std::string& key) noexcept {
  const auto value =
      ask<std::string>([=](c10d::Store& store) { return store.check({key}) ? store.get_to_str(key) : ""; });
  return value.value_or("");
}

void RankStore::end() noexcept {
  // Not set(), which does not wait until the store has it.
  ask<int64_t>([key = "ended/" + std::to_string(rendezvous_.rank)](c10d::Store& store) { return store.add(key, 1); });
}

std::vector<std::string> RankStore::exchange_texts(const std::string& own) {
  const std::string round = "text/" + std::to_string(round_++) + "/";
  set(round + std::to_string(rendezvous_.rank), "=" + own);
  std::vector<std::string> texts;
  for (int rank = 0; rank < rendezvous_.size; ++rank) {
    auto start = Clock::now();
    std::string text, last_seen;
    while ((text = get(round + std::to_string(rank))).empty()) {
      throw_if_failed();
      watch_();
      if (is_lost_) throw RankError(0, "no longer answers");
      const std::string seen = get("alive/" + std::to_string(rank));
      if (seen != last_seen) start = Clock::now();
      last_seen = seen;
      const double limit = seen.empty() ? start_limit() : rendezvous_.timeout;
      if (seconds_since(start) >= limit) {
        fail(rank, (seen.empty() ? "did not start within " : "was silent for ") + seconds_text(limit));
        throw_if_failed();
      }
      sleep_seconds(kSecondsBetweenLooks);
    }
    texts.push_back(text.substr(1));
  }
  // The store is gone with the rank that serves it, which therefore stays until the others have read everything.
  const auto start = Clock::now();
  const auto count_readers = [&](int64_t more) {
    const auto add = [key = "read/" + round, more](c10d::Store& store) { return store.add(key, more); };
    return ask<int64_t>(add).value_or(rendezvous_.size);
  };
  int64_t readers = count_readers(1);
  while (rendezvous_.listener && readers < rendezvous_.size && seconds_since(start) < rendezvous_.timeout) {
    sleep_seconds(kSecondsBetweenLooks);
    readers = count_readers(0);
  }
  return texts;
}

void RankStore::keep_alive() noexcept {
  const auto now = Clock::now().time_since_epoch();
  if (now - last_alive_ < 0.1 * milliseconds(rendezvous_.timeout)) return;
  last_alive_ = now;
  set("alive/" + std::to_string(rendezvous_.rank), std::to_string(now.count()));
}

void RankStore::fail(int rank, const std::string& reason) noexcept {
  ask<bool>([text = std::to_string(rank) + " " + reason](c10d::Store& store) {
    store.compareSet("failure", "", text);
    return true;
  });
}

void RankStore::throw_if_failed() {
  const std::string failure = get("failure");
  if (failure.empty()) return;
  const size_t space = failure.find(' ');
  throw RankError(std::stoi(failure.substr(0, space)), failure.substr(space + 1));
}

void RankStore::throw_cause(int peer, bool timed_out) {
  patience_ = 1;
  throw_if_failed();
  std::string reason;
  if (timed_out) {
    // The peer may wait for another rank itself.
    set("waits/" + std::to_string(rendezvous_.rank), std::to_string(peer));
    sleep_seconds(kSecondsOfGrace);
    for (int i = 0; i < rendezvous_.size; ++i) {
      const std::string next = get("waits/" + std::to_string(peer));
      if (next.empty() || std::stoi(next) == rendezvous_.rank) break;
      peer = std::stoi(next);
    }
    reason = "was silent for " + seconds_text(rendezvous_.timeout);
  } else {
    reason = get("ended/" + std::to_string(peer)).empty() ? "ended unexpectedly" : "ended";
  }
  fail(peer, reason);
  throw_if_failed();
  throw RankError(peer, reason);  // the store is gone
}

}  // namespace mixtral
