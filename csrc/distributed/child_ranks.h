// Ranks that are children of this process.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <csignal>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace mixtral {

// Starts ranks 1 to size - 1, and waits for their ends: none stays as a zombie.
class ChildRanks {
 public:
  struct Program {
    std::vector<std::string> command;                // empty: this process's own
    std::map<std::string, std::string> environment;  // set in addition to this process's, and RANK and LOCAL_RANK
    int descriptor = -1;                             // stays open there, with the same number
  };

  // Throws std::system_error when a process cannot be started.
  ChildRanks(int size, Program program);
  ~ChildRanks();  // ends those that have not ended themselves after two seconds

  pid_t process(int rank) const { return children_.at(rank - 1).process; }
  void check();  // throws RankError when one has ended

 private:
  struct Child {
    pid_t process = 0;  // 0: not started
    bool ended = false;
    int status = 0;
  };

  void run(int size, const Program& program, const sigset_t& signals);
  bool reap();  // whether all have ended

  std::vector<Child> children_;  // without rank 0
  std::mutex mutex_;
  std::condition_variable changed_;
  bool started_ = false, stop_ = false;
  std::exception_ptr error_;
  std::thread thread_;
};

// In a child: ends it when its parent ends; returns false when that has happened already. Signals that the terminal, or
// who stops a service, sends to all processes are the parent's to handle.
bool live_as_child_of(pid_t parent);

}  // namespace mixtral
