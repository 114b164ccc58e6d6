// `mixtral quantize`: a checkpoint with int8 or int4 weights, written once and loaded as it is.
#include <cstdio>

#include "commands.h"

namespace mixtral::app {
namespace {

struct Flags {
  std::string model, out, dtype;
  int64_t threads = 0;
};

void run(const Flags& flags) {
  ModelFlags model_flags;
  model_flags.model = flags.model;
  model_flags.dtype = flags.dtype;
  model_flags.threads = flags.threads;
  const std::filesystem::path folder = model_path(model_flags);
  check_unused(flags.out);  // before the model is read, which may take minutes
  const Config config = Config::from_folder(folder);
  const double before = weight_bytes(config, weight_type_of(ModelFlags(), config));
  LoadedEngine loaded = load_engine(model_flags, std::nullopt);
  const MixtralImpl& model = *loaded.engine.model();
  ProgressBar bar("writing", bytes_text);
  save_quantized(model, folder, flags.out, [&bar](uint64_t done, uint64_t total) {
    throw_if_terminated();
    bar.update(static_cast<double>(done), static_cast<double>(total));
  });
  write_out(flags.out + ": " + flags.dtype + ", " + bytes_text(weight_bytes(model.config(), model.weight_type())) +
            " of weights (from " + bytes_text(before) + ")\n");
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  CLI::App& command = *app.add_subcommand("quantize", "Write a checkpoint with int8 or int4 weights");
  command.add_option("MODEL", flags->model, "Folder of the checkpoint")->required()->type_name("FOLDER");
  command.add_option("OUT", flags->out, "Folder to write; it must not exist or be empty")
      ->required()
      ->type_name("FOLDER");
  add_option(command, "--dtype", flags->dtype, "int8: one scale a row; int4: one scale for every 32 weights")
      ->check(CLI::IsMember({"int8", "int4"}))
      ->required();
  add_option(command, "-t,--threads", flags->threads, "CPU threads; 0: all cores")->check(CLI::Range(0, 4096));
  command.footer(
      "Examples:\n"
      "  mixtral quantize ./Mixtral-8x7B-v0.1 ./Mixtral-8x7B-v0.1-int4 --dtype int4\n"
      "  mixtral perplexity ./Mixtral-8x7B-v0.1 book.txt --dtype int4 --compare-dtype bfloat16");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
