// Matrix products of quantized or fp32 weights with a few rows of activations. Included after lanes_math.hpp.
//
// Integer dot products of 4-byte lanes are exact; a lane's value times (weight scale * activation scale) is added to its
// float lane group after group; the lanes are added in a fixed tree at the end. Which rows are computed together (weight
// rows N, activation rows M) changes speed, never bits.
#pragma once

#include "kernel_table.hpp"

namespace {

constexpr int kInputRows = 2;

// Float codes of one block, its scale, and whether the block is finite.
inline float quantize_block(const float* x, int count, std::int32_t* codes) {
  const F a = load_first(x, count), b = count > 16 ? load_first(x + 16, count - 16) : set1(0.0f);
  const I magnitude = set1i(INT32_MAX);
  std::int32_t largest_bits[16];
  storei(largest_bits, maxi(andi(bits(a), magnitude), andi(bits(b), magnitude)));
  for (int i = 1; i < 16; ++i)
    largest_bits[0] = largest_bits[i] > largest_bits[0] ? largest_bits[i] : largest_bits[0];
  const float largest = float_of_bits(largest_bits[0]);
  if (!(largest > 1e-30f && largest <= 3.4028234e38f)) {
    for (int i = 0; i < edge::kBlock; ++i) codes[i] = 0;
    return largest <= 1e-30f ? 0.0f : __builtin_nanf("");  // a broken row must show, not vanish
  }
  const F inverse = set1(127.0f / largest);
  storei(codes, round_to_int(mul(a, inverse)));
  storei(codes + 16, round_to_int(mul(b, inverse)));
  return largest / 127.0f;
}

void quantize_int4(const float* x, int columns, int first_block, int last_block, edge::QuantizedRowOut out) {
  std::int32_t codes[edge::kBlock];
  for (int block = first_block; block < last_block; ++block) {
    out.scales[block] = quantize_block(x + block * edge::kBlock, columns - block * edge::kBlock, codes);
    std::int8_t* even = out.codes + block / 4 * 128 + block % 4 * 16;
    for (int i = 0; i < 16; ++i) {
      even[i] = static_cast<std::int8_t>(codes[2 * i]);
      even[64 + i] = static_cast<std::int8_t>(codes[2 * i + 1]);
    }
    for (int lane = 0; lane < 4; ++lane) {
      std::int32_t sum = 0;
      for (int i = 8 * lane; i < 8 * lane + 8; ++i) sum += codes[i];
      out.corrections[4 * block + lane] = -8 * sum;
    }
  }
}

void quantize_int8(const float* x, int columns, int first_block, int last_block, edge::QuantizedRowOut out) {
  std::int32_t codes[edge::kBlock];
  for (int block = first_block; block < last_block; ++block) {
    out.scales[block] = quantize_block(x + block * edge::kBlock, columns - block * edge::kBlock, codes);
    for (int i = 0; i < edge::kBlock; ++i) out.codes[block * edge::kBlock + i] = static_cast<std::int8_t>(codes[i]);
    for (int lane = 0; lane < 8; ++lane) {
      std::int32_t sum = 0;
      for (int i = 4 * lane; i < 4 * lane + 4; ++i) sum += codes[i];
      out.corrections[8 * block + lane] = -128 * sum;
    }
  }
}

struct Int4 {
  static constexpr int kBlocks = 4, kBlockBytes = 16, kCodeBytes = 128;
  using Weights = Nibbles;
  static Weights unpack(const std::uint8_t* w) { return nibbles(w); }
  static I dot(const Weights& w, const std::int8_t* x, const std::int32_t* c) { return dot4(w, x, c); }
  static F expand(const float* ws, const float* xs) { return expand4(ws, xs); }
};

struct Int8 {
  static constexpr int kBlocks = 2, kBlockBytes = 32, kCodeBytes = 64;
  using Weights = Bytes;
  static Weights unpack(const std::uint8_t* w) { return bytes(w); }
  static I dot(const Weights& w, const std::int8_t* x, const std::int32_t* c) { return dot8(w, x, c); }
  static F expand(const float* ws, const float* xs) { return expand2(ws, xs); }
};

template <typename Format, int N, int M>
void multiply_tile(const std::uint8_t* data, const float* scales, int blocks, const edge::QuantizedRow* x,
                   float (*y)[M]) {
  const std::int64_t row_bytes = static_cast<std::int64_t>(blocks) * Format::kBlockBytes;
  F sums[N][M];
  EDGE_UNROLL
  for (int n = 0; n < N; ++n)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) sums[n][m] = set1(0.0f);
  const int groups = blocks / Format::kBlocks;
  for (int g = 0; g < groups; ++g)
    EDGE_UNROLL
    for (int n = 0; n < N; ++n) {
      const std::uint8_t* w = data + n * row_bytes + g * 64;
      const float* ws = scales + static_cast<std::int64_t>(n) * blocks + g * Format::kBlocks;
      prefetch(w + N * row_bytes);
      const typename Format::Weights weights = Format::unpack(w);
      EDGE_UNROLL
      for (int m = 0; m < M; ++m) {
        const I dot = Format::dot(weights, x[m].codes + g * Format::kCodeBytes, x[m].corrections + g * 16);
        sums[n][m] = fma(to_float(dot), Format::expand(ws, x[m].scales + g * Format::kBlocks), sums[n][m]);
      }
    }
  if (const int rest = blocks % Format::kBlocks) {
    const int g = groups;
    EDGE_UNROLL
    for (int n = 0; n < N; ++n) {
      std::uint8_t w[64] = {};
      float ws[Format::kBlocks] = {};
      __builtin_memcpy(w, data + n * row_bytes + g * 64, static_cast<unsigned>(rest * Format::kBlockBytes));
      for (int b = 0; b < rest; ++b) ws[b] = scales[static_cast<std::int64_t>(n) * blocks + g * Format::kBlocks + b];
      const typename Format::Weights weights = Format::unpack(w);
      EDGE_UNROLL
      for (int m = 0; m < M; ++m) {
        const I dot = Format::dot(weights, x[m].codes + g * Format::kCodeBytes, x[m].corrections + g * 16);
        sums[n][m] = fma(to_float(dot), Format::expand(ws, x[m].scales + g * Format::kBlocks), sums[n][m]);
      }
    }
  }
  EDGE_UNROLL
  for (int n = 0; n < N; ++n)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) y[n][m] = sum_lanes(sums[n][m]);
}

template <typename Format, int N, int M>
void multiply_block(const std::uint8_t* data, const float* scales, int blocks, int n, const edge::QuantizedRow* x,
                    float* const* y) {
  float results[N][M];
  multiply_tile<Format, N, M>(data + static_cast<std::int64_t>(n) * blocks * Format::kBlockBytes,
                              scales + static_cast<std::int64_t>(n) * blocks, blocks, x, results);
  EDGE_UNROLL
  for (int m = 0; m < M; ++m)
    EDGE_UNROLL
    for (int i = 0; i < N; ++i) y[m][n + i] = results[i][m];
}

template <typename Format, int N>
void multiply_rows(const std::uint8_t* data, const float* scales, int blocks, int n, const edge::QuantizedRow* x,
                   int rows, float* const* y) {
  int m = 0;
  for (; m + kInputRows <= rows; m += kInputRows)
    multiply_block<Format, N, kInputRows>(data, scales, blocks, n, x + m, y + m);
  for (; m < rows; ++m) multiply_block<Format, N, 1>(data, scales, blocks, n, x + m, y + m);
}

template <typename Format>
void multiply(const std::uint8_t* data, const float* scales, int blocks, int first, int last,
              const edge::QuantizedRow* x, int rows, float* const* y) {
  int n = first;
  for (; n + kWeightRows <= last; n += kWeightRows)
    multiply_rows<Format, kWeightRows>(data, scales, blocks, n, x, rows, y);
  for (; n < last; ++n) multiply_rows<Format, 1>(data, scales, blocks, n, x, rows, y);
}

template <int N, int M>
void multiply_fp32_block(const float* w, std::int64_t columns, const float* const* x, float* const* y, int n) {
  F sums[N][M];
  EDGE_UNROLL
  for (int i = 0; i < N; ++i)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) sums[i][m] = set1(0.0f);
  const std::int64_t whole = columns / 16 * 16;
  for (std::int64_t c = 0; c < whole; c += 16) {
    F inputs[M];
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) inputs[m] = load(x[m] + c);
    EDGE_UNROLL
    for (int i = 0; i < N; ++i) {
      const F weights = load(w + i * columns + c);
      EDGE_UNROLL
      for (int m = 0; m < M; ++m) sums[i][m] = fma(weights, inputs[m], sums[i][m]);
    }
  }
  const int rest = static_cast<int>(columns - whole);
  EDGE_UNROLL
  for (int i = 0; rest > 0 && i < N; ++i)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m)
      sums[i][m] = fma(load_first(w + i * columns + whole, rest), load_first(x[m] + whole, rest), sums[i][m]);
  EDGE_UNROLL
  for (int i = 0; i < N; ++i)
    EDGE_UNROLL
    for (int m = 0; m < M; ++m) y[m][n + i] = sum_lanes(sums[i][m]);
}

template <int N>
void multiply_fp32_rows(const float* w, int columns, const float* const* x, int rows, float* const* y, int n) {
  int m = 0;
  for (; m + 4 <= rows; m += 4) multiply_fp32_block<N, 4>(w, columns, x + m, y + m, n);
  for (; m < rows; ++m) multiply_fp32_block<N, 1>(w, columns, x + m, y + m, n);
}

void multiply_fp32(const float* data, int columns, int first, int last, const float* const* x, int rows,
                   float* const* y) {
  int n = first;
  for (; n + kWeightRows <= last; n += kWeightRows)
    multiply_fp32_rows<kWeightRows>(data + static_cast<std::int64_t>(n) * columns, columns, x, rows, y, n);
  for (; n < last; ++n)
    multiply_fp32_rows<1>(data + static_cast<std::int64_t>(n) * columns, columns, x, rows, y, n);
}

void silu_multiply(const float* gate, const float* up, float* out, int count) {
  for (int i = 0; i < count; i += 16)
    store_first(out + i, mul(silu(load_first(gate + i, count - i)), load_first(up + i, count - i)), count - i);
}

void accumulate(float* y, const float* x, float factor, int count) {
  for (int i = 0; i < count; i += 16)
    store_first(y + i, fma(set1(factor), load_first(x + i, count - i), load_first(y + i, count - i)), count - i);
}

}  // namespace
