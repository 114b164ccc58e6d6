// Writing a packed model into a folder that from_pretrained reads without converting, at the speed of the disk, or
// maps.
//
// config.json is in Hugging Face's spelling, with {"quantization_config": {"format": "mixtral", "dtype": "int4"}}:
// without a "quant_method", which transformers needs, it refuses the folder instead of filling a model with random
// values. model.safetensors holds every parameter under its own name (model/parameters.h), matrices as packed blocks:
// I8 for int8, F8_E4M3 for fp8, U8 for int4, else the float type, in the format of csrc/ops/pack_weight/pack_weight.h.
// Tensors of whole pages come first and begin at a page, those of a layer one after the other. The small files of the
// source come along: tokenizer, chat template, generation_config.json, licence, README.
#pragma once

#include <filesystem>
#include <string>

#include "../model/config.h"
#include "load_options.h"

namespace mixtral {

class MixtralImpl;

// The text of a config.json for `config`; parse_config of it gives `config` back, but for layout and
// window_source.
std::string config_json(const Config& config);

// The same as a params.json.
std::string params_json(const Config& config);

// Writes the model of `source` in the dtype that `options` name, packed for the CPU, into an unused `folder`, which
// appears complete or not at all. Needs memory for the largest parameter alone. Also used of `options`: lora,
// check_weights, warn and progress (bytes written). Throws LoadError; std::invalid_argument when the sizes of the model
// do not allow packing, the dtype does not fit or `folder` is in use; std::runtime_error when it cannot be written.
void write_packed(const std::filesystem::path& source, const std::filesystem::path& folder, const LoadOptions& options);

// The same for `model`, packed already and then changed by calibration, with the small files of `source`.
void save_packed(const MixtralImpl& model, const std::filesystem::path& source, const std::filesystem::path& folder,
                 const Progress& progress = nullptr);

}  // namespace mixtral
