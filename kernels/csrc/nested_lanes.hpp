// Groups of bit-nested weights where sixteen lanes are one value: in 512-bit registers, on NEON, and without either.
#pragma once

namespace {

constexpr int kNestedParts = 1;
constexpr int kNestedWeights = kWeightRows > 2 ? 2 : 1;  // rows of a tile

using NestedSum = F;
using NestedCodes = decltype(eighths(nullptr));
using WholeCodes = NestedCodes;

inline NestedSum nested_zero() { return set1(0.0f); }

// 8 times the codes of the high plane.
template <int Part>
EDGE_INLINE NestedCodes high_codes(const std::uint8_t* high) {
  return eighths(high);
}

// The codes of both planes.
template <int Part>
EDGE_INLINE NestedCodes both_codes(const std::uint8_t* high, const std::uint8_t* low) {
  return planes(high, low);
}

// 7 times those and what the third plane adds.
template <int Part>
EDGE_INLINE WholeCodes whole_codes(const std::uint8_t* high, const std::uint8_t* low, const std::uint8_t* fine) {
  return wholes(high, low, fine);
}

// A group's four bfloat16, each in the lanes of its block.
template <int Part>
EDGE_INLINE NestedSum nested_scales(const std::uint16_t* scales) {
  const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  float four[4];
  bfloats4(scales, four);
  return expand4(four, ones);
}

// `sum` and what a group of a row (kNestedGroupBytes) times these codes adds.
template <int Part>
EDGE_INLINE NestedSum nested_add(const NestedCodes& w, const std::int8_t* x, NestedSum scales, NestedSum sum) {
  const I dots = dot4(w, x, reinterpret_cast<const std::int32_t*>(x + 128));
  return fma(to_float(dots), mul(scales, load(reinterpret_cast<const float*>(x + 192))), sum);
}

EDGE_INLINE float nested_total(const NestedSum* parts) { return sum_lanes(parts[0]); }

}  // namespace
