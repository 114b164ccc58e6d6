// The parts of LibTorch that the model uses: tensors, their functions, modules. torch/torch.h would take twice as long
// to compile. The build precompiles this header.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
