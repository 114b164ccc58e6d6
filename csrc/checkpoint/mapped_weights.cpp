#include "mapped_weights.h"

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../io/mapped_file.h"
#include "weights.h"

namespace mixtral {

// A part of a source, and where it lies in the file.
struct Checkpoint::Piece {
  const Source* source;
  const WeightPart* part;
  uint64_t begin, end;
};

// Why the file's bytes of a part are not those of its rows in the parameter; empty: they are.
std::string Checkpoint::why_converted(const Piece& piece, const torch::Tensor& meta) const {
  const TensorEntry& entry = piece.source->entry;
  const WeightSlice& slice = piece.source->slice;
  const std::string type = safetensors_dtype(meta.scalar_type());
  if (adapter_ && adapter_->changes(slice.parameter)) return "the adapter changes it";
  if (is_packed(meta) && !slice.packed) return "it is not packed in the files";
  if (entry.dtype != type) return "it is " + entry.dtype + " in the files and " + type + " in the model";
  if (slice.interleaved_head_dim > 0) return "the files have its rotary rows in another order";
  if (slice.transposed) return "it is transposed in the files";
  if (piece.part->columns != piece.part->row_size) return "this rank holds a part of its columns";
  return "";
}

// The same for all parts of a parameter, in the order of its rows.
std::string Checkpoint::why_not_a_view(const std::vector<Piece>& pieces, const torch::Tensor& meta) const {
  constexpr uint64_t kLeastAlignment = 4;  // of the scales inside packed blocks
  for (const Piece& piece : pieces)
    if (const std::string why = why_converted(piece, meta); !why.empty()) return why;
  const auto parted = [](const Piece& a, const Piece& b) {
    return a.source->file != b.source->file || a.end != b.begin;
  };
  if (std::adjacent_find(pieces.begin(), pieces.end(), parted) != pieces.end())
    return "its parts lie in different places of the files";
  const uint64_t alignment = std::max<uint64_t>(meta.element_size(), kLeastAlignment);
  if (pieces.front().begin % alignment != 0) return "its place in the file is not aligned";
  return "";
}

MappedWeights Checkpoint::map(const Config& config, const WeightType& type, const Placement& placement) const {
  std::map<std::string, std::vector<Piece>> pieces;
  for (const Source& source : sources_) {
    for (const WeightPart& part : source.parts) {
      const StoredRows rows = stored(source, part);
      const uint64_t begin = source.entry.begin + static_cast<uint64_t>(part.first_row) * rows.bytes_of(part.row_size);
      pieces[source.slice.parameter].push_back(
          {&source, &part, begin, begin + static_cast<uint64_t>(part.rows) * rows.bytes_of(part.row_size)});
    }
  }
  std::vector<std::shared_ptr<MappedFile>> maps(files_.size());
  MappedWeights mapped;
  for (Parameter& parameter : placed_parameters(config, placement)) {
    const bool is_mlp = parameter.shape.size() == 3;  // experts, or the dense block: nearly all of the model
    parameter.shape = shard_of(parameter, config, placement).shape;
    auto& parts = pieces.at(parameter.name);
    std::sort(parts.begin(), parts.end(),
              [](const Piece& a, const Piece& b) { return a.part->own_row < b.part->own_row; });
    const auto meta = empty_parameter(parameter, scalar_type(type.dtype), torch::kMeta, type.packing);
    const std::string why = why_not_a_view(parts, meta);
    const Piece& first = parts.front();
    if (!why.empty()) {
      if (is_mlp) {
        throw std::invalid_argument("weights mmap: " + parameter.name + " cannot be used as it is in " +
                                    files_[first.source->file].path() + ": " + why + "; `mixtral quantize MODEL OUT " +
                                    "--dtype " + type.name() + "` writes a folder that can be mapped");
      }
      mapped.read_bytes += meta.nbytes();
      if (mapped.why_read.empty()) mapped.why_read = parameter.name + ": " + why;
      continue;
    }
    std::shared_ptr<MappedFile>& map = maps[first.source->file];
    if (!map) map = std::make_shared<MappedFile>(files_[first.source->file].file());
    mapped.shows_residency = mapped.shows_residency && map->shows_residency();
    const auto view = torch::from_blob(
        map->data() + first.begin, meta.sizes(), [map](void*) {}, meta.dtype());
    mapped.bytes += view.nbytes();
    mapped.parameters.emplace(parameter.name, view);
    if (parameter.is_expert) mapped.experts.push_back(parameter.name);
  }
  return mapped;
}

}  // namespace mixtral
