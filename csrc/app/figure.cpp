#include "figure.h"

#include <unistd.h>

#include <filesystem>
#include <stdexcept>

#include "child.h"
#include "flags.h"
#include "python.h"
#include "report.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

constexpr const char* kTryImport = "try:\n import mixtral.figures\nexcept ImportError:\n raise SystemExit(1)";

}  // namespace

CLI::Option* add_svg_flag(CLI::App& app, ResultFlags& flags) {
  return add_option(app, "--svg", flags.svg, "Draw the result into a file (Python and matplotlib)")->type_name("FILE");
}

void add_result_flags(CLI::App& app, ResultFlags& flags) {
  add_switch(app, "--json", flags.json, "One JSON object");
  add_svg_flag(app, flags);
}

void check_figure(const std::string& svg) {
  if (svg.empty()) return;
  const auto folder = std::filesystem::absolute(svg).parent_path();
  if (::access(folder.c_str(), W_OK) != 0 || std::filesystem::is_directory(svg))
    throw std::invalid_argument("--svg: cannot write " + svg);
  if (run_child({python_program(), "-c", kTryImport}, "").status != 0) {
    throw std::runtime_error("--svg: " + python_program() +
                             " has no mixtral package with matplotlib: pip install 'mixtral[routing]', or name another "
                             "Python in MIXTRAL_PYTHON (without --svg no Python is needed)");
  }
}

void write_result(const std::string& command, const nlohmann::json& result, const std::string& text,
                  const ResultFlags& flags) {
  if (!flags.svg.empty()) {
    const auto child = run_child({python_program(), "-m", "mixtral.figures", command, flags.svg}, result.dump());
    if (child.status != 0) throw std::runtime_error("--svg: " + python_program() + " could not draw " + flags.svg);
  }
  write_out(flags.json ? json_line(result) : text);
}

}  // namespace mixtral::app
