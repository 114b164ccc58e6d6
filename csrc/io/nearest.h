// The nearest name, for messages that say what was perhaps meant.
#pragma once

#include <string>
#include <vector>

namespace mixtral {

// The candidate with the fewest letters to insert, delete or replace; empty when none is near.
std::string nearest(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace mixtral
