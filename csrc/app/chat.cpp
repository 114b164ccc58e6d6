// `mixtral chat`: a conversation. On a terminal a prompt, commands and Ctrl-C; from a pipe one message per line.
#include "../text/chat.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "commands.h"
#include "flags.h"
#include "load.h"
#include "report.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

constexpr const char* kHelp =
    "/clear  forget the conversation\n"
    "/bye    leave (/exit and Ctrl-D do too)\n"
    "Ctrl-C  stop the answer; a second time: leave\n";

constexpr const char* kSession = "chat";  // each turn computes only its new tokens

struct Flags {
  ModelFlags model;
  SamplingParams sampling;
  std::string system;
};

// Reads lines of stdin. std::getline would not return when a signal comes.
class LineReader {
 public:
  // None at the end of the input.
  std::optional<std::string> next(bool interactive) {
    for (;;) {
      const size_t end = held_.find('\n');
      if (end != std::string::npos) {
        const std::string line = held_.substr(0, end + 1);
        held_.erase(0, end + 1);
        return message(line);
      }
      wait_for_input(interactive);
      char buffer[4096];
      const ssize_t count = ::read(STDIN_FILENO, buffer, sizeof buffer);
      if (count > 0) {
        held_.append(buffer, static_cast<size_t>(count));
      } else if (count < 0 && errno == EINTR) {
        continue;
      } else if (count < 0) {
        throw std::system_error(errno, std::generic_category(), "cannot read stdin");
      } else if (held_.empty()) {
        return std::nullopt;
      } else {
        return message(std::exchange(held_, std::string()));
      }
    }
  }

 private:
  // Checks for signals ten times a second: one that comes just before a blocking read would not interrupt it.
  static void wait_for_input(bool interactive) {
    pollfd input = {STDIN_FILENO, POLLIN, 0};
    bool hinted = false;
    do {
      throw_if_terminated();
      if (interactive && pending_signal() != 0 && !std::exchange(hinted, true)) {
        write_err("\n(Ctrl-C again, Ctrl-D or /bye to leave)\n> ");
      }
    } while (::poll(&input, 1, 100) <= 0);
    throw_if_terminated();
  }

  static std::string message(const std::string& line) {
    std::string text = plain_text(line, "stdin");
    if (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
  }

  std::string held_;
};

class Conversation {
 public:
  Conversation(const Flags& flags, LoadedEngine& loaded) : flags_(flags), loaded_(loaded) { clear(); }

  void clear() {
    messages_.clear();
    if (!flags_.system.empty()) messages_.push_back({"system", flags_.system});
  }

  // Streams the answer to `text`; a message that does not fit the context is refused and forgotten.
  void answer(const std::string& text) {
    messages_.push_back({"user", text});
    std::vector<int64_t> ids;
    SamplingParams params = flags_.sampling;
    try {
      ids = fit_context();
    } catch (const std::invalid_argument& e) {
      messages_.pop_back();
      write_err(std::string("mixtral: ") + e.what() + "\n");
      return;
    }
    params.max_tokens = std::min(params.max_tokens, context() - static_cast<int64_t>(ids.size()));

    std::string answer;
    const auto on_text = [&answer](size_t, const std::string& piece) {
      if (pending_signal() != 0) return false;
      const bool joins = answer.empty() && piece[0] == ' ';  // the space between the prompt and the first word
      answer += piece.substr(joins);
      write_out(piece.substr(joins));
      return true;
    };
    Timings timings;
    check_finished(loaded_.engine.generate({{ids, params, kSession}}, on_text, &timings).front());
    write_out("\n");
    if (flags_.model.verbose) print_stats(timings, loaded_.seconds);
    if (answer.empty()) {
      messages_.pop_back();
    } else {
      messages_.push_back({"assistant", answer});
    }
  }

 private:
  int64_t context() { return context_of(flags_.model, loaded_.engine.config()); }

  // The ids of the conversation; the oldest turns go when there is no room for at least one new token.
  std::vector<int64_t> fit_context() {
    for (;;) {
      std::vector<int64_t> ids = apply_chat(*loaded_.engine.tokenizer(), messages_);
      const auto length = static_cast<int64_t>(ids.size());
      if (length < context()) return ids;
      const auto first_turn = messages_.begin() + (flags_.system.empty() ? 0 : 1);
      if (messages_.end() - first_turn < 3) {
        throw std::invalid_argument("message of " + std::to_string(length) + " tokens does not fit the context of " +
                                    std::to_string(context()) + " tokens");
      }
      messages_.erase(first_turn, first_turn + 2);
    }
  }

  const Flags& flags_;
  LoadedEngine& loaded_;
  std::vector<ChatMessage> messages_;
};

void converse(Conversation& conversation, bool interactive) {
  LineReader reader;
  for (;;) {
    if (interactive) write_err("> ");
    const std::optional<std::string> line = reader.next(interactive);
    if (!line || *line == "/bye" || *line == "/exit") break;
    if (interactive) forget_sigint();
    if (*line == "/clear") {
      conversation.clear();
    } else if (*line == "/help") {
      write_err(kHelp);
    } else if (!line->empty()) {
      conversation.answer(*line);
    }
  }
  if (interactive) write_err("\n");
}

void run(const Flags& flags) {
  flags.sampling.validate();
  const Tokenizer tokenizer = load_tokenizer(flags.model);
  LoadedEngine loaded = load_engine(flags.model, tokenizer);
  const bool interactive = stdin_is_terminal();
  if (interactive) {
    make_sigint_stop_the_answer();
    write_err("/help shows the commands\n");
  }
  Conversation conversation(flags, loaded);
  converse(conversation, interactive);
}

}  // namespace

void add_chat(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  flags->sampling.max_tokens = 1024;
  flags->sampling.temperature = 0.7;
  CLI::App& command = *app.add_subcommand("chat", "Talk to an instruct model");
  add_option(command, "--system", flags->system, "Instructions for the whole conversation");
  add_sampling_flags(command, flags->sampling);
  add_model_flags(command, flags->model);
  add_loading_flags(command, flags->model);
  add_cuda_graph_flag(command, flags->model);
  command.footer(
      "Examples:\n"
      "  mixtral chat ./Mixtral-8x7B-Instruct-v0.1 --system \"Answer in French.\"\n"
      "  echo \"Hello\" | mixtral chat ./Mixtral-8x7B-Instruct-v0.1 --temp 0");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
