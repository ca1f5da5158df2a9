// A part of a weight tile in 512-bit registers: all sixteen outputs, integer dot products by VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kPart = 16;       // outputs a register holds
constexpr int kTogether = 1;   // parts whose sums are taken side by side
constexpr int kPanelStep = 16;  // most rows computed together
constexpr int kDenseTiles = 2;  // of fp32 weights, and rows, whose sums fit the registers
constexpr int kDenseRows = 8;

using P = F;

inline P part_half(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline P part_load(const float* p) { return load(p); }
inline void part_store(float* p, P x) { store(p, x); }
inline P part_set1(float x) { return set1(x); }

struct Weights {
  __m512i group[8];  // 4 columns of 16 outputs each, unsigned
};

struct PartInt4 {
  static constexpr int kTileBytes = 256;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int) {
    const __m512i mask = _mm512_set1_epi8(15);
    Weights w;
    EDGE_UNROLL
    for (int c = 0; c < 4; ++c) {
      const __m512i both = _mm512_loadu_si512(tile + 64 * c);
      w.group[2 * c] = _mm512_and_si512(both, mask);
      w.group[2 * c + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
    return w;
  }
  // Exact dot products of a block with J rows, as floats.
  template <int J>
  static EDGE_INLINE void dot(const Weights& w, const std::int8_t* x, const std::int32_t* corrections,
                              P (&out)[kTogether][J]) {
    constexpr int kChains = J == 1 ? 4 : J == 2 ? 2 : 1;  // enough additions side by side to hide their latency
    __m512i sums[J][kChains];
    EDGE_UNROLL
    for (int j = 0; j < J; ++j)
      EDGE_UNROLL
      for (int c = 0; c < kChains; ++c) sums[j][c] = _mm512_set1_epi32(c == 0 ? corrections[j] : 0);
    EDGE_UNROLL
    for (int g = 0; g < 8; ++g)
      EDGE_UNROLL
      for (int j = 0; j < J; ++j) {
        std::int32_t four;
        __builtin_memcpy(&four, x + 32 * j + 4 * g, 4);
        sums[j][g % kChains] = _mm512_dpbusd_epi32(sums[j][g % kChains], w.group[g], _mm512_set1_epi32(four));
      }
    EDGE_UNROLL
    for (int j = 0; j < J; ++j) {
      EDGE_UNROLL
      for (int c = 1; c < kChains; ++c) sums[j][0] = _mm512_add_epi32(sums[j][0], sums[j][c]);
      out[0][j] = {_mm512_cvtepi32_ps(sums[j][0])};
    }
  }
};

struct PartInt8 : PartInt4 {
  static constexpr int kTileBytes = 512;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int) {
    Weights w;
    EDGE_UNROLL
    for (int g = 0; g < 8; ++g) w.group[g] = _mm512_loadu_si512(tile + 64 * g);
    return w;
  }
};

}  // namespace
