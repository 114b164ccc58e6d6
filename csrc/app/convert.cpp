// `mixtral convert`: any checkpoint that can be read, as a plain Hugging Face folder.
#include "../checkpoint/convert.h"

#include <memory>

#include "commands.h"
#include "flags.h"
#include "load.h"
#include "report.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct ConvertFlags {
  ModelFlags model;
  std::string out;
};

void run(const ConvertFlags& flags) {
  LoadOptions options = load_options(flags.model);
  ProgressBar bar("converting", bytes_text);
  uint64_t written = 0;
  options.progress = [&](uint64_t done, uint64_t total) {
    throw_if_terminated();
    bar.update(static_cast<double>(written = done), static_cast<double>(total));
  };
  convert(model_path(flags.model), flags.out, options);
  write_out(flags.out + ": " + bytes_text(static_cast<double>(written)) + " of weights\n");
}

}  // namespace

void add_convert(CLI::App& app) {
  auto flags = std::make_shared<ConvertFlags>();
  CLI::App& command = *app.add_subcommand("convert", "Write a checkpoint as a Hugging Face folder with safetensors");
  command
      .add_option("MODEL", flags->model.model,
                  "Folder of the checkpoint, .gguf file, or org/name in the Hugging Face cache")
      ->required()
      ->type_name("PATH");
  command.add_option("OUT", flags->out, "Folder to write; it must not exist or be empty")
      ->required()
      ->type_name("FOLDER");
  add_option(command, "--dtype", flags->model.dtype, "Type of the weights; auto: the checkpoint's")
      ->check(CLI::IsMember({"auto", "float32", "bfloat16", "float16"}))
      ->capture_default_str();
  add_loading_flags(command, flags->model);
  command.footer(
      "Quantised weights of a GGUF file become bfloat16. The work needs memory for one parameter at a time, 2 GB for\n"
      "Mixtral 8x7B in bfloat16.\n\n"
      "Examples:\n"
      "  mixtral convert ./mixtral-8x7b-32kseqlen ./Mixtral-8x7B\n"
      "  mixtral convert mixtral-8x7b.Q6_K.gguf ./Mixtral-8x7B --dtype float16\n"
      "  mixtral convert ./Mixtral-8x7B-v0.1 ./merged --lora ./adapter");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
