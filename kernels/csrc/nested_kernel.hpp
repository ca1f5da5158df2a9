// Products of bit-nested weights (edge_kernels/nested.py) with rows quantized as for int4. Included after
// experts_kernel.hpp, whose order of operations it keeps: read at 4 bits, a row has the bits of the int4 kernel.
#pragma once

#include "kernel_table.hpp"

namespace {

constexpr int kPlaneBytes = 32;  // of a group of 128 weights
constexpr int kGroupBlocks = 4;

// Codes 4 h + 1.5 - 8 are (8 h - 13) / 2: whole numbers once the activations' scales are halved.
void quantize_nested2(const float* x, int columns, int first_block, int last_block, edge::QuantizedRowOut out) {
  quantize_int4(x, columns, first_block, last_block, out);
  for (int block = first_block; block < last_block; ++block) {
    out.scales[block] *= 0.5f;
    for (int lane = 4 * block; lane < 4 * block + 4; ++lane) out.corrections[lane] = out.corrections[lane] / 8 * 13;
  }
}

struct HighPlane {
  static auto unpack(const edge::NestedRows& w, std::int64_t at) { return eighths(w.high + at); }
};

struct BothPlanes {
  static auto unpack(const edge::NestedRows& w, std::int64_t at) { return planes(w.high + at, w.low + at); }
};

template <typename View, int N, int M>
void nested_tile(const edge::NestedRows& w, std::int64_t first, const edge::QuantizedRow* x, float* const* y) {
  F sums[N][M];
  EDGE_UNROLL
  for (int n = 0; n < N; ++n)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) sums[n][m] = set1(0.0f);
  for (int g = 0; g < w.groups; ++g)
    EDGE_UNROLL
    for (int n = 0; n < N; ++n) {
      const std::int64_t group = (first + n) * w.groups + g;
      const auto weights = View::unpack(w, group * kPlaneBytes);
      float scales[kGroupBlocks];
      bfloats4(w.scales + group * kGroupBlocks, scales);
      EDGE_UNROLL
      for (int m = 0; m < M; ++m) {
        const I dot = dot4(weights, x[m].codes + g * 128, x[m].corrections + g * 16);
        sums[n][m] = fma(to_float(dot), expand4(scales, x[m].scales + g * kGroupBlocks), sums[n][m]);
      }
    }
  EDGE_UNROLL
  for (int m = 0; m < M; ++m)
    EDGE_UNROLL
    for (int n = 0; n < N; ++n) y[m][first + n] = sum_lanes(sums[n][m]);
}

template <typename View, int N>
void nested_rows(const edge::NestedRows& w, std::int64_t first, const edge::QuantizedRow* x, int rows,
                 float* const* y) {
  int m = 0;
  for (; m + kInputRows <= rows; m += kInputRows) nested_tile<View, N, kInputRows>(w, first, x + m, y + m);
  for (; m < rows; ++m) nested_tile<View, N, 1>(w, first, x + m, y + m);
}

template <typename View>
void multiply_nested(const edge::NestedRows& w, int count, const edge::QuantizedRow* x, int rows, float* const* y) {
  int n = 0;
  for (; n + kWeightRows <= count; n += kWeightRows) nested_rows<View, kWeightRows>(w, n, x, rows, y);
  for (; n < count; ++n) nested_rows<View, 1>(w, n, x, rows, y);
}

}  // namespace
