// Reader of Python's pickle format, protocol 2, as plain data: what the file asks Python to call stays a note of it,
// and nothing is ever called. No torch in here.
#pragma once

#include <cstdint>
#include <deque>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace mixtral {

struct PickleValue {
  enum Kind {
    kOther,  // None, a float, ...: of no use here
    kNumber,
    kText,
    kTuple,
    kList,
    kDict,        // items: key, value, key, value, ...
    kGlobal,      // text: "module.name"
    kCall,        // items: the global, then its arguments
    kPersistent,  // items: the id of an object that lies elsewhere
  } kind = kOther;
  int64_t number = 0;
  std::string_view text;        // into the bytes that were read
  std::vector<uint32_t> items;  // indices into Pickle::values, for a value may be in several places, or in itself
};

struct Pickle {
  std::deque<PickleValue> values;
  uint32_t root = 0;

  const PickleValue& at(uint32_t index) const { return values[index]; }
  const PickleValue& item(const PickleValue& value, size_t i) const { return values[value.items.at(i)]; }
};

// `bytes` must outlive the result. `globals` are the "module.name" that may occur, besides collections.OrderedDict,
// which becomes a kDict. Throws LoadError (file `file`) for any other one, for opcodes that such data does not need,
// and past 2^18 values.
Pickle read_pickle(std::string_view bytes, const std::string& file, const std::set<std::string_view>& globals);

}  // namespace mixtral
