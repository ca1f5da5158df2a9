// A part of a weight tile in 256-bit registers: eight outputs.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kPart = 8;       // outputs a register holds
constexpr int kPanelStep = 4;  // most rows computed together
constexpr int kDenseTiles = 1;  // of fp32 weights, and rows, whose sums fit the registers
constexpr int kDenseRows = 4;

struct P {
  __m256 v;
};

inline P part_half(const std::uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline P part_load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void part_store(float* p, P x) { _mm256_storeu_ps(p, x.v); }
inline P part_set1(float x) { return {_mm256_set1_ps(x)}; }
inline P fma(P x, P y, P z) { return {_mm256_fmadd_ps(x.v, y.v, z.v)}; }
inline P add(P x, P y) { return {_mm256_add_ps(x.v, y.v)}; }
inline P mul(P x, P y) { return {_mm256_mul_ps(x.v, y.v)}; }

struct Weights {
  __m256i group[8];  // 4 columns of 8 outputs each
};

inline __m256i four_columns(const std::int8_t* x) {
  std::int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

struct PartInt4 {
  static constexpr int kTileBytes = 256;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int part) {
    const __m256i mask = _mm256_set1_epi8(15);
    Weights w;
    EDGE_UNROLL
    for (int c = 0; c < 4; ++c) {
      const __m256i both = load256(tile + 64 * c + 32 * part);
      w.group[2 * c] = _mm256_and_si256(both, mask);
      w.group[2 * c + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
    return w;
  }
  // 8 * 2 * 15 * 127 fits 16 bits, so all eight groups add before they widen.
  template <int J>
  static EDGE_INLINE void dot(const Weights& w, const std::int8_t* x, const std::int32_t* corrections, P (&out)[J]) {
    EDGE_UNROLL
    for (int j = 0; j < J; ++j) {
      __m256i pairs = _mm256_maddubs_epi16(w.group[0], four_columns(x + 32 * j));
      EDGE_UNROLL
      for (int g = 1; g < 8; ++g)
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w.group[g], four_columns(x + 32 * j + 4 * g)));
      const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
      out[j] = {_mm256_cvtepi32_ps(_mm256_add_epi32(sums, _mm256_set1_epi32(corrections[j])))};
    }
  }
};

struct PartInt8 {
  static constexpr int kTileBytes = 512;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int part) {
    Weights w;
    EDGE_UNROLL
    for (int g = 0; g < 8; ++g)
      w.group[g] = _mm256_xor_si256(load256(tile + 64 * g + 32 * part), _mm256_set1_epi8(-128));
    return w;
  }
  template <int J>
  static EDGE_INLINE void dot(const Weights& w, const std::int8_t* x, const std::int32_t*, P (&out)[J]) {
    EDGE_UNROLL
    for (int j = 0; j < J; ++j) {
      __m256i sums = dot_signed(w.group[0], four_columns(x + 32 * j));
      EDGE_UNROLL
      for (int g = 1; g < 8; ++g) sums = _mm256_add_epi32(sums, dot_signed(w.group[g], four_columns(x + 32 * j + 4 * g)));
      out[j] = {_mm256_cvtepi32_ps(sums)};
    }
  }
};

}  // namespace
