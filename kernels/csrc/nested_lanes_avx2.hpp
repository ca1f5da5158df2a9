// Groups of bit-nested weights in 256-bit registers: half of a group after the other, two blocks each, so that the sums of
// several rows fit the registers.
#pragma once

#include "lanes_avx2.hpp"

namespace {

constexpr int kNestedParts = 2;
constexpr int kNestedWeights = 1;  // rows of a tile

struct NestedSum {
  __m256 v;
};
struct NestedCodes {
  __m256i even, odd;
};
struct WholeCodes {
  __m256i even, odd;
};

inline NestedSum nested_zero() { return {_mm256_setzero_ps()}; }

// 8 times the codes of the high plane.
template <int Part>
EDGE_INLINE NestedCodes high_codes(const std::uint8_t* high) {
  const __m256i h = load256(high), mask = _mm256_set1_epi8(24);
  const __m256i even = Part == 0 ? _mm256_slli_epi16(h, 3) : _mm256_slli_epi16(h, 1);
  const __m256i odd = Part == 0 ? _mm256_srli_epi16(h, 1) : _mm256_srli_epi16(h, 3);
  return {_mm256_and_si256(even, mask), _mm256_and_si256(odd, mask)};
}

// The codes of both planes, those of odd columns in the higher bits.
template <int Part>
EDGE_INLINE __m256i packed_codes(const std::uint8_t* high, const std::uint8_t* low) {
  const __m256i h = load256(high), l = load256(low);
  const __m256i first = _mm256_set1_epi8(0x33), second = _mm256_set1_epi8(static_cast<char>(0xCC));
  return Part == 0 ? _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(h, first), 2), _mm256_and_si256(l, first))
                   : _mm256_or_si256(_mm256_and_si256(h, second), _mm256_and_si256(_mm256_srli_epi16(l, 2), first));
}

template <int Part>
EDGE_INLINE NestedCodes both_codes(const std::uint8_t* high, const std::uint8_t* low) {
  const __m256i codes = packed_codes<Part>(high, low), mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(codes, mask), _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask)};
}

// 7 times those and what the third plane adds.
template <int Part>
EDGE_INLINE WholeCodes whole_codes(const std::uint8_t* high, const std::uint8_t* low, const std::uint8_t* fine) {
  const __m256i codes = packed_codes<Part>(high, low), f = load256(fine + 32 * Part);
  const __m256i mask = _mm256_set1_epi8(15), upper = _mm256_set1_epi8(120);
  const __m256i even_codes = _mm256_and_si256(codes, mask), odd_codes = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask);
  const __m256i even = _mm256_add_epi8(_mm256_and_si256(_mm256_slli_epi16(codes, 3), upper), _mm256_and_si256(f, mask));
  const __m256i odd = _mm256_add_epi8(_mm256_and_si256(_mm256_srli_epi16(codes, 1), upper),
                                      _mm256_and_si256(_mm256_srli_epi16(f, 4), mask));
  return {_mm256_sub_epi8(even, even_codes), _mm256_sub_epi8(odd, odd_codes)};
}

// Two bfloat16 of a group's four, each in the lanes of its block.
template <int Part>
EDGE_INLINE NestedSum nested_scales(const std::uint16_t* scales) {
  constexpr char a = 4 * Part, b = a + 1, c = a + 2, d = a + 3;
  const __m256i place = _mm256_setr_epi8(-1, -1, a, b, -1, -1, a, b, -1, -1, a, b, -1, -1, a, b,  //
                                         -1, -1, c, d, -1, -1, c, d, -1, -1, c, d, -1, -1, c, d);
  const __m256d four = _mm256_broadcast_sd(reinterpret_cast<const double*>(scales));
  return {_mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_castpd_si256(four), place))};
}

// Eight products a lane. 2 * 2 * 24 * 127 fits 16 bits.
template <int Part>
EDGE_INLINE __m256i nested_dots(const NestedCodes& w, const std::int8_t* x) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.even, load256(x + 32 * Part)),
                                         _mm256_maddubs_epi16(w.odd, load256(x + 64 + 32 * Part)));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
// 2 * 120 * 127 fits 16 bits, twice that does not.
template <int Part>
EDGE_INLINE __m256i nested_dots(const WholeCodes& w, const std::int8_t* x) {
  const __m256i ones = _mm256_set1_epi16(1);
  return _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(w.even, load256(x + 32 * Part)), ones),
                          _mm256_madd_epi16(_mm256_maddubs_epi16(w.odd, load256(x + 64 + 32 * Part)), ones));
}

// `sum` and what a group of a row (kNestedGroupBytes) times these codes adds.
template <int Part, typename Codes>
EDGE_INLINE NestedSum nested_add(const Codes& w, const std::int8_t* x, NestedSum scales, NestedSum sum) {
  const __m256i dots = _mm256_add_epi32(nested_dots<Part>(w, x), load256(x + 128 + 32 * Part));
  const __m256 scale = _mm256_mul_ps(scales.v, _mm256_loadu_ps(reinterpret_cast<const float*>(x + 192 + 32 * Part)));
  return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scale, sum.v)};
}

EDGE_INLINE float nested_total(const NestedSum* parts) { return sum_lanes(F{parts[0].v, parts[1].v}); }

}  // namespace
