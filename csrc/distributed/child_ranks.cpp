#include "child_ranks.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>

#include "rank_error.h"

namespace mixtral {
namespace {

constexpr std::chrono::milliseconds kBetweenLooks{50};
constexpr std::chrono::seconds kToEnd{2};

std::vector<std::string> own_arguments() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::vector<std::string> arguments;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\0', begin);
    arguments.push_back(text.substr(begin, end - begin));
    begin = end == std::string::npos ? text.size() : end + 1;
  }
  return arguments;
}

std::vector<std::string> with_environment(const std::map<std::string, std::string>& values) {
  std::vector<std::string> entries;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    if (values.count(text.substr(0, text.find('='))) == 0) entries.push_back(text);
  }
  for (const auto& [name, value] : values) entries.push_back(name + "=" + value);
  return entries;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (std::string& text : texts) result.push_back(text.data());
  result.push_back(nullptr);
  return result;
}

pid_t spawn(const ChildRanks::Program& program, const std::map<std::string, std::string>& values,
            const sigset_t& signals) {
  std::vector<std::string> arguments = program.command.empty() ? own_arguments() : program.command;
  const std::string path =
      program.command.empty() ? std::filesystem::read_symlink("/proc/self/exe").string() : arguments.at(0);
  std::vector<std::string> environment = with_environment(values);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  if (program.descriptor >= 0)  // onto itself: it stays open
    posix_spawn_file_actions_adddup2(&actions, program.descriptor, program.descriptor);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
  posix_spawnattr_setsigmask(&attributes, &signals);
  pid_t process = 0;
  const int error = posix_spawnp(&process, path.c_str(), &actions, &attributes, pointers(arguments).data(),
                                 pointers(environment).data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) throw std::system_error(error, std::generic_category(), "cannot start another rank, " + path);
  return process;
}

}  // namespace

ChildRanks::ChildRanks(int size, Program program) : children_(size - 1) {
  // The children end with the thread that has started them (live_as_child_of), so it is one that lives as long as this.
  // It handles no signals: those are for the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this, size, program = std::move(program), before] { run(size, program, before); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return started_; });
  if (!error_) return;
  lock.unlock();
  thread_.join();
  std::rethrow_exception(error_);
}

ChildRanks::~ChildRanks() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

void ChildRanks::run(int size, const Program& program, const sigset_t& signals) {
  std::unique_lock lock(mutex_);
  try {
    std::map<std::string, std::string> values = program.environment;
    for (int rank = 1; rank < size; ++rank) {
      values["RANK"] = values["LOCAL_RANK"] = std::to_string(rank);
      children_[rank - 1].process = spawn(program, values, signals);
    }
  } catch (const std::exception&) {
    error_ = std::current_exception();
    stop_ = true;
    for (const Child& child : children_) {
      if (child.process > 0) ::kill(child.process, SIGKILL);
    }
  }
  started_ = true;
  changed_.notify_all();
  while (!stop_) {
    reap();
    changed_.wait_for(lock, kBetweenLooks);
  }
  const auto deadline = std::chrono::steady_clock::now() + kToEnd;
  while (!reap()) {
    if (std::chrono::steady_clock::now() > deadline) {
      for (const Child& child : children_) {
        if (!child.ended) ::kill(child.process, SIGKILL);
      }
    }
    changed_.wait_for(lock, kBetweenLooks / 10);
  }
}

bool ChildRanks::reap() {
  for (Child& child : children_) {
    if (child.ended || child.process == 0) continue;
    const pid_t result = ::waitpid(child.process, &child.status, WNOHANG);
    child.ended = result == child.process || (result < 0 && errno == ECHILD);  // the program ignores SIGCHLD
  }
  return std::all_of(children_.begin(), children_.end(),
                     [](const Child& child) { return child.ended || child.process == 0; });
}

void ChildRanks::check() {
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < children_.size(); ++i) {
    const auto& [process, ended, status] = children_[i];
    if (!ended) continue;
    const std::string how = WIFSIGNALED(status) ? "was ended by signal " + std::to_string(WTERMSIG(status))
                                                : "ended with status " + std::to_string(WEXITSTATUS(status));
    throw RankError(static_cast<int>(i) + 1, how);
  }
}

bool live_as_child_of(pid_t parent) {
  std::signal(SIGINT, SIG_IGN);
  std::signal(SIGTERM, SIG_IGN);
  return prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && getppid() == parent;
}

}  // namespace mixtral
