#include "mapped_weights.h"

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../io/mapped_file.h"
#include "weights.h"

namespace mixtral {

// Why the file's bytes of one slice are not those of its rows in the parameter; empty: they are.
std::string Checkpoint::why_converted(const Source& source, const torch::Tensor& meta) const {
  const TensorEntry& entry = source.entry;
  const WeightSlice& slice = source.slice;
  const std::string type = safetensors_dtype(meta.scalar_type());
  if (adapter_ && adapter_->changes(slice.parameter)) return "the adapter changes it";
  if (is_packed(meta) && !slice.packed) return "it is not packed in the files";
  if (entry.dtype != type) return "it is " + entry.dtype + " in the files and " + type + " in the model";
  if (slice.interleaved_head_dim > 0) return "the files have its rotary rows in another order";
  if (slice.transposed) return "it is transposed in the files";
  return "";
}

// The same for all slices of a parameter, in the order of their rows.
std::string Checkpoint::why_not_a_view(const std::vector<const Source*>& sources, const torch::Tensor& meta) const {
  constexpr uint64_t kLeastAlignment = 4;  // of the scales inside packed blocks
  for (const Source* source : sources)
    if (const std::string why = why_converted(*source, meta); !why.empty()) return why;
  const auto parted = [](const Source* a, const Source* b) {
    return a->file != b->file || a->entry.end != b->entry.begin;
  };
  if (std::adjacent_find(sources.begin(), sources.end(), parted) != sources.end())
    return "its parts lie in different places of the files";
  const uint64_t alignment = std::max<uint64_t>(meta.element_size(), kLeastAlignment);
  if (sources.front()->entry.begin % alignment != 0) return "its place in the file is not aligned";
  return "";
}

MappedWeights Checkpoint::map(const Config& config, const WeightType& type) const {
  std::map<std::string, std::vector<const Source*>> sources;
  for (const Source& source : sources_) sources[source.slice.parameter].push_back(&source);
  std::vector<std::shared_ptr<MappedFile>> maps(files_.size());
  MappedWeights mapped;
  for (const Parameter& parameter : model_parameters(config)) {
    auto& parts = sources.at(parameter.name);
    std::sort(parts.begin(), parts.end(),
              [](const Source* a, const Source* b) { return a->slice.first_row < b->slice.first_row; });
    const auto meta = empty_parameter(parameter, scalar_type(type.dtype), torch::kMeta, type.packing);
    if (const std::string why = why_not_a_view(parts, meta); !why.empty()) {
      if (parameter.shape.size() == 3) {  // experts, or the dense block: nearly all of the model
        throw std::invalid_argument("weights mmap: " + parameter.name + " cannot be used as it is in " +
                                    files_[parts.front()->file].path() + ": " + why + "; `mixtral quantize MODEL OUT " +
                                    "--dtype " + type.name() + "` writes a folder that can be mapped");
      }
      mapped.read_bytes += meta.nbytes();
      if (mapped.why_read.empty()) mapped.why_read = parameter.name + ": " + why;
      continue;
    }
    const Source& first = *parts.front();
    std::shared_ptr<MappedFile>& map = maps[first.file];
    if (!map) map = std::make_shared<MappedFile>(files_[first.file].file());
    mapped.shows_residency = mapped.shows_residency && map->shows_residency();
    const auto view = torch::from_blob(
        map->data() + first.entry.begin, meta.sizes(), [map](void*) {}, meta.dtype());
    mapped.bytes += view.nbytes();
    mapped.parameters.emplace(parameter.name, view);
    if (parameter.is_expert) mapped.experts.push_back(parameter.name);
  }
  return mapped;
}

}  // namespace mixtral
