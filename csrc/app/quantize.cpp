// `mixtral quantize`: a checkpoint with int8, fp8 or int4 weights, or floats in the order in which the CPU kernels read
// them, written once and loaded as it is.
#include <cmath>
#include <memory>
#include <stdexcept>

#include "../checkpoint/calibrate.h"
#include "../checkpoint/config_reader.h"
#include "../checkpoint/output_folder.h"
#include "../checkpoint/save.h"
#include "commands.h"
#include "flags.h"
#include "load.h"
#include "report.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct QuantizeFlags {
  ModelFlags model;
  std::string out;
  std::string calibrate;  // path of a text; empty: nearest rounding
};

std::string matrices_text(double matrices) { return std::to_string(std::llround(matrices)) + " matrices"; }

struct CalibrationText {
  int64_t bos = 0;
  std::vector<int64_t> ids;
};

CalibrationText read_text(const QuantizeFlags& flags, const Config& config, const std::filesystem::path& folder) {
  if (flags.model.dtype != "int4")
    throw std::invalid_argument("--calibrate needs --dtype int4, got " + flags.model.dtype);
  if (!config.quantization.empty()) {
    throw std::invalid_argument("--calibrate needs a checkpoint that is not quantised, got " + config.quantization);
  }
  const std::string text = read_file(flags.calibrate);
  if (text.empty()) throw std::invalid_argument("--calibrate FILE must not be empty, got " + flags.calibrate);
  const Tokenizer tokenizer(folder);
  return {tokenizer.bos_id(), tokenizer.encode(text)};
}

Progress show_in(ProgressBar& bar) {
  return [&bar](uint64_t done, uint64_t total) {
    throw_if_terminated();
    bar.update(static_cast<double>(done), static_cast<double>(total));
  };
}

// In memory as a whole, for the calibration runs it.
void write_calibrated(const QuantizeFlags& flags, const std::filesystem::path& folder, const CalibrationText& text) {
  LoadedEngine loaded = load_engine(flags.model, std::nullopt);
  MixtralImpl& model = loaded.engine.model();
  ProgressBar calibrating("calibrating", matrices_text);
  calibrate(model, folder, text.bos, text.ids, show_in(calibrating), flags.model.lora);
  ProgressBar writing("writing", bytes_text);
  save_packed(model, folder, flags.out, show_in(writing));
}

void write_at_once(const QuantizeFlags& flags, const std::filesystem::path& folder) {
  LoadOptions options = load_options(flags.model);
  ProgressBar bar("writing", bytes_text);
  options.progress = show_in(bar);
  write_packed(folder, flags.out, options);
}

void run(const QuantizeFlags& flags) {
  check_unused(flags.out);  // before the model is read, which may take minutes
  const std::filesystem::path folder = model_path(flags.model);
  const Config config = read_config(folder);
  const double before = weight_bytes(config, weight_type_of(ModelFlags(), config));
  if (flags.calibrate.empty()) {
    write_at_once(flags, folder);
  } else {
    write_calibrated(flags, folder, read_text(flags, config, folder));
  }
  write_out(flags.out + ": " + flags.model.dtype + ", " +
            bytes_text(weight_bytes(config, weight_type_of(flags.model, config))) + " of weights (from " +
            bytes_text(before) + ")\n");
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto flags = std::make_shared<QuantizeFlags>();
  CLI::App& command = *app.add_subcommand(
      "quantize", "Write a checkpoint with int8, fp8 or int4 weights, or packed for --weights mmap");
  command
      .add_option("MODEL", flags->model.model,
                  "Folder of the checkpoint, .gguf file, or org/name in the Hugging Face cache")
      ->required()
      ->type_name("FOLDER");
  command.add_option("OUT", flags->out, "Folder to write; it must not exist or be empty")
      ->required()
      ->type_name("FOLDER");
  add_option(command, "--dtype", flags->model.dtype,
             "int8 and fp8: one scale a row; int4: one scale for every 32 weights; the others: the same numbers in the "
             "order of the CPU kernels")
      ->check(CLI::IsMember({"int8", "fp8", "int4", "bfloat16", "float16", "float32"}))
      ->required();
  add_option(command, "--calibrate", flags->calibrate,
             "A text of the kind the model is for: int4 weights are rounded so that its results change least")
      ->type_name("FILE");
  add_loading_flags(command, flags->model);
  add_option(command, "-t,--threads", flags->model.threads, "CPU threads; 0: all cores")->check(in_range(0, 4096));
  command.footer(
      "Without --calibrate the work needs memory for one parameter at a time, 2 GB for Mixtral 8x7B in bfloat16.\n"
      "--calibrate reads the whole text in one pass: some 50000 tokens are enough. For Mixtral 8x7B that takes 3 "
      "PFLOP\n"
      "and 50 GB: the int4 weights, 250 KB a token, 6 GB for a layer in float32, 7 GB for one expert's matrices.\n\n"
      "Examples:\n"
      "  mixtral quantize ./Mixtral-8x7B-v0.1 ./Mixtral-8x7B-v0.1-int4 --dtype int4\n"
      "  mixtral quantize ./Mixtral-8x7B-v0.1 ./Mixtral-8x7B-v0.1-int4 --dtype int4 --calibrate book.txt\n"
      "  mixtral quantize ./Mixtral-8x7B-v0.1 ./Mixtral-8x7B-tuned-int4 --dtype int4 --lora ./adapter\n"
      "  mixtral perplexity ./Mixtral-8x7B-v0.1 book.txt --dtype int4 --compare-dtype bfloat16");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
