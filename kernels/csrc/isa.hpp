// Which instruction set the kernels use: the best this processor has, unless a test asks for another.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.hpp"

namespace edge {

const KernelTable& kernels();
std::vector<std::string> available_isas();  // best first
void set_isa(const std::string& name);      // throws std::invalid_argument

}  // namespace edge
