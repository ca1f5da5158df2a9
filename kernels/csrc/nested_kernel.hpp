// Products of bit-nested weights (edge_kernels/nested.py) with quantized rows. Included after experts_kernel.hpp, whose
// order of operations it keeps: read at 4 bits, a row has the bits of the int4 kernel.
//
// A group of 128 weights has sixteen lanes, each of eight products that share a scale. Some lanes of a group are a part;
// how many parts a group has, and their products, are the instruction set's (nested_lanes*.hpp).
#pragma once

#include "kernel_table.hpp"

namespace {

constexpr int kPlaneBytes = 32;  // of a group of 128 weights, in each of the first two planes
constexpr int kFineBytes = 64;   // in the third
constexpr int kGroupBlocks = 4;
constexpr int kNestedRows = 4;  // most rows that share the unpacking of weights, which costs as much as multiplying half a row

// The code 8 stands for 0, or of the high plane alone 4 h + 1.5 - 8 = (8 h - 13) / 2: whole numbers once scales are halved.
// Of all planes code - 8 + (fine - 8) / 7 = (7 code + fine - 64) / 7, from 0 to 120: two products with a row's codes fit 16
// bits.
struct HighPlane {
  static constexpr int kZeroPoint = 13;
  static constexpr float kUnit = 0.5f;
  using Codes = NestedCodes;
  template <int Part>
  static EDGE_INLINE Codes unpack(const edge::NestedRows& w, std::int64_t group) {
    return high_codes<Part>(w.high + group * kPlaneBytes);
  }
};

struct BothPlanes {
  static constexpr int kZeroPoint = 8;
  static constexpr float kUnit = 1.0f;
  using Codes = NestedCodes;
  template <int Part>
  static EDGE_INLINE Codes unpack(const edge::NestedRows& w, std::int64_t group) {
    return both_codes<Part>(w.high + group * kPlaneBytes, w.low + group * kPlaneBytes);
  }
};

struct AllPlanes {
  static constexpr int kZeroPoint = 64;
  static constexpr float kUnit = 1.0f / 7.0f;
  using Codes = WholeCodes;
  template <int Part>
  static EDGE_INLINE Codes unpack(const edge::NestedRows& w, std::int64_t group) {
    return whole_codes<Part>(w.high + group * kPlaneBytes, w.low + group * kPlaneBytes, w.fine + group * kFineBytes);
  }
};

template <typename View>
void quantize_nested(const float* x, int columns, int first_block, int last_block, edge::QuantizedRowOut out) {
  std::int32_t codes[edge::kBlock];
  for (int block = first_block; block < last_block; ++block) {
    const float scale = View::kUnit * quantize_block(x + block * edge::kBlock, columns - block * edge::kBlock, codes);
    std::int8_t* group = out.codes + block / kGroupBlocks * edge::kNestedGroupBytes;
    const int place = 16 * (block % kGroupBlocks);
    for (int i = 0; i < 16; ++i) {
      group[place + i] = static_cast<std::int8_t>(codes[2 * i]);
      group[64 + place + i] = static_cast<std::int8_t>(codes[2 * i + 1]);
    }
    for (int lane = 0; lane < 4; ++lane) {
      std::int32_t sum = 0;
      for (int i = 8 * lane; i < 8 * lane + 8; ++i) sum += codes[i];
      sum *= -View::kZeroPoint;
      __builtin_memcpy(group + 128 + place + 4 * lane, &sum, sizeof sum);
      __builtin_memcpy(group + 192 + place + 4 * lane, &scale, sizeof scale);
    }
  }
}

template <typename View, int Part, int N, int M>
EDGE_INLINE void nested_part(const edge::NestedRows& w, std::int64_t first, const edge::QuantizedRow* x,
                             NestedSum (&sums)[N][M][kNestedParts]) {
  NestedSum own[N][M];
  const std::int8_t* rows[M];
  EDGE_UNROLL
  for (int m = 0; m < M; ++m) rows[m] = x[m].codes;
  EDGE_UNROLL
  for (int n = 0; n < N; ++n)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) own[n][m] = nested_zero();
  const edge::NestedRows planes = w;
  const std::int64_t groups = planes.groups;
  for (std::int64_t g = 0; g < groups; ++g)
    EDGE_UNROLL
    for (int n = 0; n < N; ++n) {
      const std::int64_t group = (first + n) * groups + g;
      const typename View::Codes codes = View::template unpack<Part>(planes, group);
      const NestedSum scales = nested_scales<Part>(planes.scales + group * kGroupBlocks);
      EDGE_UNROLL
      for (int m = 0; m < M; ++m)
        own[n][m] = nested_add<Part>(codes, rows[m] + g * edge::kNestedGroupBytes, scales, own[n][m]);
    }
  EDGE_UNROLL
  for (int n = 0; n < N; ++n)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) sums[n][m][Part] = own[n][m];
}

template <typename View, int N, int M>
void nested_tile(const edge::NestedRows& w, std::int64_t first, const edge::QuantizedRow* x, float* const* y) {
  NestedSum sums[N][M][kNestedParts];
  nested_part<View, 0>(w, first, x, sums);
  if constexpr (kNestedParts == 2) nested_part<View, 1>(w, first, x, sums);
  EDGE_UNROLL
  for (int m = 0; m < M; ++m)
    EDGE_UNROLL
    for (int n = 0; n < N; ++n) y[m][first + n] = nested_total(sums[n][m]);
}

template <typename View, int M>
void nested_rows(const edge::NestedRows& w, int count, const edge::QuantizedRow* x, float* const* y) {
  int n = 0;
  for (; n + kNestedWeights <= count; n += kNestedWeights) nested_tile<View, kNestedWeights, M>(w, n, x, y);
  for (; n < count; ++n) nested_tile<View, 1, M>(w, n, x, y);
}

template <typename View>
void multiply_nested(const edge::NestedRows& w, int count, const edge::QuantizedRow* x, int rows, float* const* y) {
  int m = 0;
  for (; m + kNestedRows <= rows; m += kNestedRows) nested_rows<View, kNestedRows>(w, count, x + m, y + m);
  if (rows - m == 3) return nested_rows<View, 3>(w, count, x + m, y + m);
  if (rows - m == 2) return nested_rows<View, 2>(w, count, x + m, y + m);
  if (rows - m == 1) return nested_rows<View, 1>(w, count, x + m, y + m);
}

}  // namespace
