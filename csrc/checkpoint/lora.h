// LoRA (Hu et al., 2021): the weights that an adapter changes, W + s B A, computed while the checkpoint is read.
//
// Names are those of PEFT over a Hugging Face model, or of mistral-finetune: "<module>.lora_A.weight" [r,in] and
// "<module>.lora_B.weight" [out,r] for a matrix [out,in]. An expert parameter of transformers 5, [E,out,in], has A [E
// r, in] and B [out, r E]: row e r + i of A and column i E + e of B belong to expert e; PEFT before 0.19.1 swapped in
// and out. Any other tensor is a whole parameter that was trained (modules_to_save) and takes the place of the
// checkpoint's.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "../io/tensor_file.h"
#include "../model/config.h"
#include "../model/libtorch.h"
#include "lora_config.h"
#include "weight_names.h"

namespace mixtral {

class Adapter {
 public:
  // Reads all of it. Throws LoadError when it is damaged or was made for another model.
  Adapter(const std::filesystem::path& folder, const Config& config);

  bool changes(const std::string& parameter) const { return changes_.count(parameter) > 0; }
  // rows f32 [n,columns]: rows from `first_row` on, and of each the columns from `first_column` on, of a parameter seen
  // as [rows,cols]; changed in place. Every element gets the same bits, whichever others come with it.
  void merge_into(const torch::Tensor& rows, const std::string& parameter, int64_t first_row,
                  int64_t first_column = 0) const;

 private:
  // Rows from `first_row` on of one parameter.
  struct Change {
    int64_t first_row;
    torch::Tensor left, right;  // f32 [n,r] and [cols,r]; left right^T, times the scale, is added
    double scale;
    torch::Tensor whole;  // or [n,cols], in the type of the file, which takes the rows' place
  };
  std::map<std::string, std::vector<Change>> changes_;  // by parameter

  friend class AdapterReader;
};

}  // namespace mixtral
