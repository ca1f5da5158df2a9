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

// A part of row m, from output n on.
inline void put(P y, int n, std::int64_t m, const edge::TileOut& out) {
  const int count = out.outputs - n;
  float* to = out.y + m * out.stride + n;
  if (count >= kPart) return part_store(to, out.bias ? add(y, part_load(out.bias + n)) : y);
  float v[kPart];
  part_store(v, y);
  for (int i = 0; i < count; ++i) to[i] = out.bias ? v[i] + out.bias[n + i] : v[i];
}

// Parts `part` .. `part + kTogether - 1` of a tile.
template <typename Format, int M>
void linear_parts(const std::uint8_t* tile, int blocks, int part, const edge::PanelRows& x, int first,
                  const edge::TileOut& out) {
  constexpr int J = M < kInterleaved ? M : kInterleaved;
  P sums[kTogether][M];
  EDGE_UNROLL
  for (int t = 0; t < kTogether; ++t)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) sums[t][m] = part_set1(0.0f);
  const std::int8_t* row_codes = x.codes + first * edge::kBlock;
  for (int block = 0; block < blocks; ++block) {
    const std::uint8_t* pair = tile + (block >> 1) * (2 * Format::kTileBytes + 4 * edge::kTileOutputs);
    const std::uint8_t* codes = pair + (block & 1) * Format::kTileBytes;
    const auto* scales = reinterpret_cast<const std::uint16_t*>(pair + 2 * Format::kTileBytes);
    const Weights w = Format::unpack(codes, part);
    P weight_scales[kTogether];
    EDGE_UNROLL
    for (int t = 0; t < kTogether; ++t)
      weight_scales[t] = part_half(scales + (block & 1) * edge::kTileOutputs + kPart * (part + t));
    for (int line = 0; line < Format::kTileBytes + 32; line += 64) prefetch(codes + kPrefetchBytes + line);
    EDGE_UNROLL
    for (int m = 0; m < M; m += J) {
      P dots[kTogether][J];
      Format::template dot<J>(w, row_codes + m * edge::kBlock, x.corrections + block * x.stride + first + m, dots);
      EDGE_UNROLL
      for (int j = 0; j < J; ++j) {
        const P row_scale = part_set1(x.scales[block * x.stride + first + m + j]);
        EDGE_UNROLL
        for (int t = 0; t < kTogether; ++t)
          sums[t][m + j] = fma(dots[t][j], mul(weight_scales[t], row_scale), sums[t][m + j]);
      }
    }
    row_codes += x.stride * edge::kBlock;
  }
  EDGE_UNROLL
  for (int t = 0; t < kTogether; ++t)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) put(mul(sums[t][m], part_set1(out.unit)), kPart * (part + t), first + m, out);
}

template <typename Format, int M>
void linear_rows(const std::uint8_t* tile, int blocks, const edge::PanelRows& x, int first, const edge::TileOut& out) {
  for (int part = 0; kPart * part < out.outputs; part += kTogether)
    linear_parts<Format, M>(tile, blocks, part, x, first, out);
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

// fp32: T tiles [column][16 outputs] times M rows; each output's sum runs over the columns in order.
template <int T, int M>
void dense_rows(const float* tiles, std::int64_t columns, const float* x, std::int64_t x_stride, int first,
                const edge::TileOut& out) {
  constexpr int kParts = edge::kTileOutputs / kPart;
  P sums[T][kParts][M];
  EDGE_UNROLL
  for (int t = 0; t < T; ++t)
    EDGE_UNROLL
    for (int p = 0; p < kParts; ++p)
      EDGE_UNROLL
      for (int m = 0; m < M; ++m) sums[t][p][m] = part_set1(0.0f);
  for (std::int64_t c = 0; c < columns; ++c) {
    P weights[T][kParts];
    EDGE_UNROLL
    for (int t = 0; t < T; ++t) {
      const float* tile = tiles + (t * columns + c) * edge::kTileOutputs;
      prefetch(tile + kPrefetchBytes / 4);
      EDGE_UNROLL
      for (int p = 0; p < kParts; ++p) weights[t][p] = part_load(tile + kPart * p);
    }
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) {
      const P input = part_set1(x[(first + m) * x_stride + c]);
      EDGE_UNROLL
      for (int t = 0; t < T; ++t)
        EDGE_UNROLL
        for (int p = 0; p < kParts; ++p) sums[t][p][m] = fma(weights[t][p], input, sums[t][p][m]);
    }
  }
  EDGE_UNROLL
  for (int t = 0; t < T; ++t)
    EDGE_UNROLL
    for (int p = 0; p < kParts; ++p) {
      const int n = edge::kTileOutputs * t + kPart * p;
      if (n >= out.outputs) continue;
      EDGE_UNROLL
      for (int m = 0; m < M; ++m) put(sums[t][p][m], n, first + m, out);
    }
}

template <int T>
void dense_tiles(const float* tiles, std::int64_t columns, const float* x, std::int64_t x_stride, int rows,
                 const edge::TileOut& out) {
  int m = 0;
  for (; m + kDenseRows <= rows; m += kDenseRows) dense_rows<T, kDenseRows>(tiles, columns, x, x_stride, m, out);
  if constexpr (kDenseRows > 4)
    for (; m + 4 <= rows; m += 4) dense_rows<T, 4>(tiles, columns, x, x_stride, m, out);
  for (; m + 2 <= rows; m += 2) dense_rows<T, 2>(tiles, columns, x, x_stride, m, out);
  for (; m < rows; ++m) dense_rows<T, 1>(tiles, columns, x, x_stride, m, out);
}

void linear_fp32(const float* tile, std::int64_t columns, const float* x, std::int64_t x_stride, int rows,
                 const edge::TileOut& out) {
  constexpr int kTogether = edge::kTileOutputs * kDenseTiles;
  for (int n = 0; n < out.outputs;) {
    edge::TileOut part = out;
    part.y += n;
    part.bias += part.bias ? n : 0;
    part.outputs -= n;
    const bool is_last_alone = kDenseTiles > 1 && part.outputs <= edge::kTileOutputs;
    if (is_last_alone)
      dense_tiles<1>(tile + n * columns, columns, x, x_stride, rows, part);
    else
      dense_tiles<kDenseTiles>(tile + n * columns, columns, x, x_stride, rows, part);
    n += kTogether;
  }
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
