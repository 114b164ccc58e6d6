// Reader of state dicts that torch.save wrote (.bin, .pt, .pth): a zip archive with a pickle of names and shapes, and
// one member of raw bytes for each storage. Nothing of the pickle is executed (pickle.h). No torch in here.
#pragma once

#include <filesystem>

#include "tensor_file.h"

namespace mixtral {

// A dict of tensors, or one beneath "state_dict", "model", "model_state_dict" or "module". Tensors may share storages.
// Throws LoadError when the file is no such archive, asks for anything but tensors, or a tensor is not contiguous.
TensorFile open_torch_pickle(const std::filesystem::path& path);

}  // namespace mixtral
