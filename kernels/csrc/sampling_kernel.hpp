// The two loops of the sampler that run over a whole vocabulary; compilers vectorise them for each instruction set.
#pragma once

#include "fixed_math.hpp"

namespace {

void exp_all(const double* x, double* y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) y[i] = edge::fixed_exp(x[i]);
}

void uniform_all(std::uint64_t seed, std::uint32_t position, const std::uint32_t* ids, double* u, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) u[i] = edge::uniform(seed, position, ids[i]);
}

}  // namespace
