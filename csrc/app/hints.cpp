#include "hints.h"

#include <algorithm>

#include "../io/nearest.h"

namespace mixtral::app {
namespace {

constexpr const char* kLeaveOut = "not needed here, leave it out";

struct ForeignFlag {
  const char* name;
  const char* advice;
};

constexpr ForeignFlag kForeignFlags[] = {
    {"-ngl", "use --device cuda"},
    {"--n-gpu-layers", "use --device cuda"},
    {"--gpu-layers", "use --device cuda"},
    {"--n-predict", "use --max-tokens"},
    {"--predict", "use --max-tokens"},
    {"--max-new-tokens", "use --max-tokens"},
    {"--max_new_tokens", "use --max-tokens"},
    {"--max_tokens", "use --max-tokens"},
    {"--repeat-penalty", "use --repetition-penalty"},
    {"--repetition_penalty", "use --repetition-penalty"},
    {"--presence_penalty", "use --presence-penalty"},
    {"--frequency_penalty", "use --frequency-penalty"},
    {"--num-return-sequences", "use --samples"},
    {"--top_p", "use --top-p"},
    {"--top_k", "use --top-k"},
    {"--batch-size", "use --chunk-size"},
    {"-ub", "use --chunk-size"},
    {"--ubatch-size", "use --chunk-size"},
    {"--max-model-len", "use --ctx-size"},
    {"--n-ctx", "use --ctx-size"},
    {"-sys", "use --system of mixtral chat"},
    {"--system-prompt", "use --system of mixtral chat"},
    {"-cnv", "use mixtral chat"},
    {"--conversation", "use mixtral chat"},
    {"-i", "use mixtral chat"},
    {"--interactive", "use mixtral chat"},
    {"-hf", "name the model as the first argument"},
    {"--hf-repo", "name the model as the first argument"},
    {"-ctk", "the cache has the type of the activations"},
    {"--cache-type-k", "the cache has the type of the activations"},
    {"-p", "messages come from stdin, a line each"},
    {"--prompt", "messages come from stdin, a line each"},
    {"-no-cnv", kLeaveOut},
    {"--no-cnv", kLeaveOut},
    {"-fa", kLeaveOut},
    {"--flash-attn", kLeaveOut},
    {"--mlock", kLeaveOut},
    {"--no-mmap", kLeaveOut},
    {"--no-warmup", kLeaveOut},
};

bool has_flag(const CLI::App& command, const std::string& name) {
  const auto options = command.get_options();
  return std::any_of(options.begin(), options.end(), [&](const CLI::Option* o) { return o->check_name(name); });
}

}  // namespace

std::string nearest_hint(const std::string& word, const std::vector<std::string>& candidates) {
  const std::string found = nearest(word, candidates);
  return found.empty() ? "" : ", did you mean " + found + "?";
}

std::string unknown_argument(const CLI::App& command) {
  const std::string word = command.remaining().front();
  if (word.front() != '-') return "unexpected argument " + word + ": give a prompt with -p TEXT";
  std::vector<std::string> flags;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
  }
  return "unknown flag " + word + nearest_hint(word.substr(0, word.find('=')), flags);
}

std::string foreign_flag_hint(const CLI::App& command, const std::vector<std::string>& arguments) {
  for (const std::string& argument : arguments) {
    const std::string name = argument.substr(0, argument.find('='));
    for (const ForeignFlag& flag : kForeignFlags) {
      if (name == flag.name && !has_flag(command, name)) return "unknown flag " + name + ": " + flag.advice;
    }
  }
  return "";
}

std::string not_a_number(const std::string& message) {
  const std::string begin = "Could not convert: ", equals = " = ";
  const size_t name = message.find(begin), value = message.find(equals);
  if (name != 0 || value == std::string::npos) return message;
  return message.substr(begin.size(), value - begin.size()) + " must be a number, got " +
         message.substr(value + equals.size());
}

}  // namespace mixtral::app
