// A store on one of the ranks, through which they find each other, and which keeps what a failing rank had to say.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "communicator.h"

namespace c10d {
class Store;
}

namespace mixtral {

struct Rendezvous {
  int rank = 0, size = 1;
  std::string address = "127.0.0.1";  // of the store
  int port = 0;
  std::optional<int>
      listener;         // of the rank that serves the store: a socket that listens there, which is then the store's
  double timeout = 30;  // seconds
  std::string prefix = "mixtral/";  // of its keys: a store may serve several groups
};

// Texts that the ranks of a group leave for each other. Throws RankError.
class RankStore {
 public:
  explicit RankStore(const Rendezvous& rendezvous);
  ~RankStore();

  // `look` is called again and again while this rank waits for others, and throws to end that.
  void watch(std::function<void()> look) { watch_ = std::move(look); }
  // As those of a Communicator.
  std::vector<std::string> exchange_texts(const std::string& own);
  void keep_alive() noexcept;
  void fail(int rank, const std::string& reason) noexcept;  // the first reason counts

  // Throws the RankError of `peer`, with whom an exchange has failed, or of the rank that is its cause. `timed_out`: it
  // was silent; otherwise its connection was closed.
  [[noreturn]] void throw_cause(int peer, bool timed_out);
  void throw_if_failed();

  // Says that this rank ends as it should.
  void end() noexcept;

  const Rendezvous& rendezvous() const { return rendezvous_; }
  const c10::intrusive_ptr<c10d::Store>& keys() const { return store_; }

 private:
  template <typename T>
  std::optional<T> ask(std::function<T(c10d::Store&)> question) noexcept;
  void set(const std::string& key, const std::string& value) noexcept;
  std::string get(const std::string& key) noexcept;  // the value, where there is one
  double start_limit() const;

  const Rendezvous rendezvous_;
  c10::intrusive_ptr<c10d::Store> store_;
  bool is_lost_ = false;  // the store did not answer
  double patience_;       // seconds in which it must
  std::function<void()> watch_ = [] {};
  int round_ = 0;
  std::chrono::steady_clock::duration last_alive_{};  // of the clock of this host
};

}  // namespace mixtral
