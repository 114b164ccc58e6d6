// `mixtral chat`: a conversation. On a terminal a prompt, commands and Ctrl-C; from a pipe one message per line.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "../text/chat_format.h"
#include "commands.h"
#include "conversation_file.h"
#include "flags.h"
#include "load.h"
#include "ranks.h"
#include "report.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

constexpr const char* kHelp =
    "/clear  forget the conversation\n"
    "/bye    leave (/exit and Ctrl-D do too)\n"
    "Ctrl-C  stop the answer; a second time: leave\n";

struct ChatFlags {
  ModelFlags model;
  SamplingParams sampling;
  std::string system, chat_template;
  std::string load, save, prompt_cache;  // files
  bool generation_config = false;
};

// Reads lines of stdin. std::getline would not return when a signal comes.
class LineReader {
 public:
  explicit LineReader(const Engine& engine) : engine_(engine) {}

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
  // Checks for signals ten times a second: one that comes just before a blocking read would not interrupt it. Another
  // rank may be lost meanwhile.
  void wait_for_input(bool interactive) const {
    pollfd input = {STDIN_FILENO, POLLIN, 0};
    bool hinted = false;
    do {
      throw_if_terminated();
      if (interactive && pending_signal() != 0 && !std::exchange(hinted, true)) {
        write_err("\n(Ctrl-C again, Ctrl-D or /bye to leave)\n> ");
      }
      if (const auto failure = engine_.failure()) throw std::runtime_error(*failure);
    } while (::poll(&input, 1, 100) <= 0);
    throw_if_terminated();
  }

  static std::string message(const std::string& line) {
    std::string text = plain_text(line, "stdin");
    if (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
  }

  const Engine& engine_;
  std::string held_;
};

class Conversation {
 public:
  Conversation(const ChatFlags& flags, const ChatFormat& format, LoadedEngine& loaded,
               std::vector<ChatMessage> messages)
      : flags_(flags), format_(format), loaded_(loaded), messages_(std::move(messages)) {
    if (messages_.empty()) clear();
  }

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
    const Generation generation = loaded_.engine.generate({ids}, {params}, on_text, &timings).front();
    check_finished(generation);
    write_out("\n");
    if (flags_.model.verbose) print_stats(timings, loaded_.seconds);
    if (answer.empty()) {
      messages_.pop_back();
    } else {
      messages_.push_back({"assistant", answer});
      if (!flags_.save.empty()) write_conversation(messages_, flags_.save);
      save_prompt_cache(loaded_.engine, generation, flags_.prompt_cache);
    }
  }

 private:
  bool has_system_message() const { return !messages_.empty() && messages_[0].role == "system"; }
  int64_t context() { return context_of(flags_.model, loaded_.engine.config()); }

  // The ids of the conversation; the oldest turns go when there is no room for at least one new token.
  std::vector<int64_t> fit_context() {
    for (;;) {
      std::vector<int64_t> ids = format_.encode(messages_);
      const auto length = static_cast<int64_t>(ids.size());
      if (length < context()) return ids;
      const auto first_turn = messages_.begin() + (has_system_message() ? 1 : 0);
      if (messages_.end() - first_turn < 3) {
        throw std::invalid_argument("message of " + std::to_string(length) + " tokens does not fit the context of " +
                                    std::to_string(context()) + " tokens");
      }
      messages_.erase(first_turn, first_turn + 2);
    }
  }

  const ChatFlags& flags_;
  const ChatFormat& format_;
  LoadedEngine& loaded_;
  std::vector<ChatMessage> messages_;
};

void converse(Conversation& conversation, const Engine& engine, bool interactive) {
  LineReader reader(engine);
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

// What the model's format does not take is told before the weights are read.
void check_format(const ChatFormat& format, std::vector<ChatMessage> messages, const std::string& system) {
  if (!system.empty()) messages.insert(messages.begin(), {"system", system});
  messages.push_back({"user", "Hi"});
  format.encode(messages);
}

// A model that was taught the format ends its answers so, whether or not its files name it as a stop id.
void stop_at_end_of_answer(const ChatFormat& format, const Engine& engine, SamplingParams& sampling) {
  const std::string end = format.end_of_answer();
  const std::vector<int64_t>& known = engine.config().eos_token_ids;
  const std::optional<int64_t> id = engine.tokenizer()->control_id(end);
  const bool is_known = id && std::find(known.begin(), known.end(), *id) != known.end();
  if (!end.empty() && !is_known && !sampling.ignore_eos) sampling.stop.push_back(end);
}

void run(const CLI::App& command, ChatFlags flags) {
  follow_as_rank(flags.model);
  if (flags.generation_config) use_generation_config(command, model_path(flags.model), flags.sampling);
  flags.sampling.validate();
  const Tokenizer tokenizer = load_tokenizer(flags.model);
  const ChatFormat format(model_path(flags.model), tokenizer, flags.chat_template);
  std::vector<ChatMessage> messages;
  if (!flags.load.empty()) messages = read_conversation(flags.load);
  check_format(format, messages, flags.system);
  LoadedEngine loaded = load_engine(flags.model, tokenizer);
  stop_at_end_of_answer(format, loaded.engine, flags.sampling);
  const bool interactive = stdin_is_terminal();
  if (interactive) {
    make_sigint_stop_the_answer();
    write_err("/help shows the commands\n");
  }
  load_prompt_cache(loaded.engine, flags.prompt_cache);
  Conversation conversation(flags, format, loaded, std::move(messages));
  converse(conversation, loaded.engine, interactive);
}

}  // namespace

void add_chat(CLI::App& app) {
  auto flags = std::make_shared<ChatFlags>();
  flags->sampling.max_tokens = 1024;
  flags->sampling.temperature = 0.7;
  CLI::App& command = *app.add_subcommand("chat", "Talk to an instruct model");
  CLI::Option* const system = add_option(command, "--system", flags->system, "Instructions for the whole conversation");
  add_option(command, "--load", flags->load, "Go on with the conversation of this file")
      ->type_name("FILE")
      ->excludes(system);
  add_option(command, "--save", flags->save, "Keep the conversation in this file, after every answer")
      ->type_name("FILE");
  add_prompt_cache(command, flags->prompt_cache);
  add_chat_template(command, flags->chat_template);
  add_sampling_flags(command, flags->sampling);
  add_generation_config(command, flags->generation_config);
  add_model_flags(command, flags->model);
  add_loading_flags(command, flags->model);
  add_weights_flag(command, flags->model);
  add_mlock_flag(command, flags->model);
  add_offload_flags(command, flags->model);
  add_experts_flag(command, flags->model);
  add_cuda_graph_flag(command, flags->model);
  add_speculate_flag(command, flags->model);
  add_kv_memory_flag(command, flags->model);
  add_rank_flags(command, flags->model);
  command.footer(
      "Examples:\n"
      "  mixtral chat ./Mixtral-8x7B-Instruct-v0.1 --system \"Answer in French.\"\n"
      "  echo \"Hello\" | mixtral chat ./Mixtral-8x7B-Instruct-v0.1 --temp 0\n"
      "  mixtral chat ./Mixtral-8x7B-v0.1 --chat-template chatml\n"
      "The format is that of the model's chat template: docs/chat_formats.md.");
  command.callback([flags, &command] { run(command, *flags); });
}

}  // namespace mixtral::app
