// Quantized matrices in tiles of sixteen outputs, times panels of quantized rows. Included after a linear_lanes_*.hpp.
//
// Each output has one float accumulator. Block after block of 32 columns, the exact integer dot product, as a float,
// times (weight scale * activation scale) is fused into it. Which outputs and rows are computed together changes speed,
// never bits.
#pragma once

#include "kernel_table.hpp"

namespace {

constexpr int kPrefetchBytes = 4096;
constexpr int kInterleaved = kPanelStep < 4 ? kPanelStep : 4;  // rows whose dot products run side by side

template <typename Format, int M>
void linear_part(const std::uint8_t* tile, int blocks, int part, const edge::PanelRows& x, int first,
                 const edge::TileOut& out) {
  constexpr int J = M < kInterleaved ? M : kInterleaved;
  P sums[M];
  EDGE_UNROLL
  for (int m = 0; m < M; ++m) sums[m] = part_set1(0.0f);
  const std::int8_t* row_codes = x.codes + first * edge::kBlock;
  for (int block = 0; block < blocks; ++block) {
    const std::uint8_t* pair = tile + (block >> 1) * (2 * Format::kTileBytes + 4 * edge::kTileOutputs);
    const std::uint8_t* codes = pair + (block & 1) * Format::kTileBytes;
    const auto* scales = reinterpret_cast<const std::uint16_t*>(pair + 2 * Format::kTileBytes);
    const Weights w = Format::unpack(codes, part);
    const P weight_scales = part_half(scales + (block & 1) * edge::kTileOutputs + kPart * part);
    for (int line = 0; line < Format::kTileBytes + 32; line += 64) prefetch(codes + kPrefetchBytes + line);
    EDGE_UNROLL
    for (int m = 0; m < M; m += J) {
      P dots[J];
      Format::template dot<J>(w, row_codes + m * edge::kBlock, x.corrections + block * x.stride + first + m, dots);
      EDGE_UNROLL
      for (int j = 0; j < J; ++j)
        sums[m + j] =
            fma(dots[j], mul(weight_scales, part_set1(x.scales[block * x.stride + first + m + j])), sums[m + j]);
    }
    row_codes += x.stride * edge::kBlock;
  }
  const int count = out.outputs - kPart * part;
  EDGE_UNROLL
  for (int m = 0; m < M; ++m) {
    P y = mul(sums[m], part_set1(out.unit));
    float* to = out.y + (first + m) * out.stride + kPart * part;
    if (count >= kPart) {
      part_store(to, out.bias ? add(y, part_load(out.bias + kPart * part)) : y);
    } else {
      float v[kPart];
      part_store(v, y);
      for (int i = 0; i < count; ++i) to[i] = out.bias ? v[i] + out.bias[kPart * part + i] : v[i];
    }
  }
}

template <typename Format, int M>
void linear_rows(const std::uint8_t* tile, int blocks, const edge::PanelRows& x, int first, const edge::TileOut& out) {
  for (int part = 0; kPart * part < out.outputs; ++part)
    linear_part<Format, M>(tile, blocks, part, x, first, out);
}

template <typename Format>
void linear(const std::uint8_t* tile, int blocks, const edge::PanelRows& x, const edge::TileOut& out) {
  int m = 0;
  if constexpr (kPanelStep >= 16)
    for (; m + 16 <= x.stride; m += 16) linear_rows<Format, 16>(tile, blocks, x, m, out);
  if constexpr (kPanelStep >= 8)
    for (; m + 8 <= x.stride; m += 8) linear_rows<Format, 8>(tile, blocks, x, m, out);
  if constexpr (kPanelStep >= 4)
    for (; m + 4 <= x.stride; m += 4) linear_rows<Format, 4>(tile, blocks, x, m, out);
  for (; m + 2 <= x.stride; m += 2) linear_rows<Format, 2>(tile, blocks, x, m, out);
  for (; m < x.stride; ++m) linear_rows<Format, 1>(tile, blocks, x, m, out);
}

void quantize_row(const float* x, int columns, int zero_point, const edge::PanelRowOut& out) {
  std::int32_t codes[edge::kBlock];
  std::int8_t* to = out.codes;
  for (int block = 0; block * edge::kBlock < columns; ++block, to += out.stride * edge::kBlock) {
    out.scales[block * out.stride] = quantize_block(x + block * edge::kBlock, columns - block * edge::kBlock, codes);
    std::int32_t sum = 0;
    for (int i = 0; i < edge::kBlock; ++i) {
      to[i] = static_cast<std::int8_t>(codes[i]);
      sum += codes[i];
    }
    out.corrections[block * out.stride] = -zero_point * sum;
  }
}

}  // namespace
