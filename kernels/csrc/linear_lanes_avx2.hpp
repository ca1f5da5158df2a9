// Parts of a weight tile in 256-bit registers: eight outputs each, both halves of a tile together.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kPart = 8;       // outputs a register holds
constexpr int kTogether = 2;   // parts: a line of weights is read once, and each row's columns are spread once for both
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

// Sixteen registers do not hold a block, so it is unpacked line by line where it is multiplied.
struct Weights {
  const std::uint8_t* codes;
};

inline __m256i four_columns(const std::int8_t* x) {
  std::int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Sums are taken where they stand: left alone, GCC keeps all products of a block in memory and adds them up in the end.
inline __m256i settled(__m256i sum) {
#if defined(__GNUC__)
  __asm__("" : "+x"(sum));
#endif
  return sum;
}

template <int J>
using Sums = __m256i[kTogether][J];

struct PartInt4 {
  static constexpr int kTileBytes = 256;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int) { return {tile}; }
  // 8 * 2 * 15 * 127 fits 16 bits, so all eight groups add before they widen.
  template <int J>
  static EDGE_INLINE void dot(const Weights& w, const std::int8_t* x, const std::int32_t* corrections,
                              P (&out)[kTogether][J]) {
    const __m256i mask = _mm256_set1_epi8(15);
    Sums<J> pairs;
    EDGE_UNROLL
    for (int g = 0; g < 8; ++g) {
      __m256i weights[kTogether];
      EDGE_UNROLL
      for (int t = 0; t < kTogether; ++t) {
        const __m256i both = load256(w.codes + 64 * (g / 2) + 32 * t);
        weights[t] = _mm256_and_si256(g % 2 == 0 ? both : _mm256_srli_epi16(both, 4), mask);
      }
      EDGE_UNROLL
      for (int j = 0; j < J; ++j) {
        const __m256i columns = four_columns(x + 32 * j + 4 * g);
        EDGE_UNROLL
        for (int t = 0; t < kTogether; ++t) {
          const __m256i products = _mm256_maddubs_epi16(weights[t], columns);
          pairs[t][j] = settled(g == 0 ? products : _mm256_add_epi16(pairs[t][j], products));
        }
      }
    }
    EDGE_UNROLL
    for (int j = 0; j < J; ++j)
      EDGE_UNROLL
      for (int t = 0; t < kTogether; ++t) {
        const __m256i sums = _mm256_madd_epi16(pairs[t][j], _mm256_set1_epi16(1));
        out[t][j] = {_mm256_cvtepi32_ps(_mm256_add_epi32(sums, _mm256_set1_epi32(corrections[j])))};
      }
  }
};

struct PartInt8 {
  static constexpr int kTileBytes = 512;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int) { return {tile}; }
  template <int J>
  static EDGE_INLINE void dot(const Weights& w, const std::int8_t* x, const std::int32_t*, P (&out)[kTogether][J]) {
    Sums<J> sums;
    EDGE_UNROLL
    for (int g = 0; g < 8; ++g) {
      __m256i weights[kTogether];
      EDGE_UNROLL
      for (int t = 0; t < kTogether; ++t)
        weights[t] = _mm256_xor_si256(load256(w.codes + 64 * g + 32 * t), _mm256_set1_epi8(-128));
      EDGE_UNROLL
      for (int j = 0; j < J; ++j) {
        const __m256i columns = four_columns(x + 32 * j + 4 * g);
        EDGE_UNROLL
        for (int t = 0; t < kTogether; ++t) {
          const __m256i products = dot_signed(weights[t], columns);
          sums[t][j] = settled(g == 0 ? products : _mm256_add_epi32(sums[t][j], products));
        }
      }
    }
    EDGE_UNROLL
    for (int j = 0; j < J; ++j)
      EDGE_UNROLL
      for (int t = 0; t < kTogether; ++t) out[t][j] = {_mm256_cvtepi32_ps(sums[t][j])};
  }
};

}  // namespace
