// Sixteen lanes as one 512-bit register, integer dot products by VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kQueryBlock = 4;
constexpr int kWeightRows = 4;
constexpr int kHashLanes = 16;
constexpr bool kRotatesBytesByShuffle = false;

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};

inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F fma(F x, F y, F z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
inline F add(F x, F y) { return {_mm512_add_ps(x.v, y.v)}; }
inline F sub(F x, F y) { return {_mm512_sub_ps(x.v, y.v)}; }
inline F mul(F x, F y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline F div(F x, F y) { return {_mm512_div_ps(x.v, y.v)}; }
inline F max(F x, F y) { return {_mm512_max_ps(x.v, y.v)}; }
inline F min(F x, F y) { return {_mm512_min_ps(x.v, y.v)}; }
inline I bits(F x) { return {_mm512_castps_si512(x.v)}; }
inline F from_bits(I x) { return {_mm512_castsi512_ps(x.v)}; }
inline I set1i(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I addi(I x, I y) { return {_mm512_add_epi32(x.v, y.v)}; }
inline I subi(I x, I y) { return {_mm512_sub_epi32(x.v, y.v)}; }
inline I andi(I x, I y) { return {_mm512_and_si512(x.v, y.v)}; }
inline I ori(I x, I y) { return {_mm512_or_si512(x.v, y.v)}; }
inline I maxi(I x, I y) { return {_mm512_max_epi32(x.v, y.v)}; }
inline I shift_left_23(I x) { return {_mm512_slli_epi32(x.v, 23)}; }
inline void storei(std::int32_t* p, I x) { _mm512_storeu_si512(p, x.v); }
inline F to_float(I x) { return {_mm512_cvtepi32_ps(x.v)}; }

inline F expand4(const float* ws, const float* xs) {
  const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return {_mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_mul_ps(_mm_loadu_ps(ws), _mm_loadu_ps(xs))))};
}
inline F expand2(const float* ws, const float* xs) {
  const __m256 low = _mm256_set1_ps(ws[0] * xs[0]), high = _mm256_set1_ps(ws[1] * xs[1]);
  return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
}

struct Nibbles {
  __m512i low, high;
};
inline Nibbles nibbles(const std::uint8_t* w) {
  const __m512i mask = _mm512_set1_epi8(15), both = _mm512_loadu_si512(w);
  return {_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
}
inline I dot4(const Nibbles& w, const std::int8_t* x, const std::int32_t* corrections) {
  const __m512i even = _mm512_dpbusd_epi32(_mm512_loadu_si512(corrections), w.low, _mm512_loadu_si512(x));
  return {_mm512_dpbusd_epi32(even, w.high, _mm512_loadu_si512(x + 64))};
}

// Two planes of 2 bits, 32 bytes each, to the codes of a group (edge_kernels/nested.py); and 8 times those of one.
inline Nibbles planes(const std::uint8_t* high, const std::uint8_t* low) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  const __m256i first = _mm256_set1_epi8(0x33), second = _mm256_set1_epi8(static_cast<char>(0xCC));
  const __m256i a = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(h, first), 2), _mm256_and_si256(l, first));
  const __m256i b = _mm256_or_si256(_mm256_and_si256(h, second), _mm256_and_si256(_mm256_srli_epi16(l, 2), first));
  const __m512i mask = _mm512_set1_epi8(15), both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  return {_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
}
// 7 times the codes and what a third plane of 4 bits, 64 bytes, adds.
inline __m512i seven_times(__m512i codes) { return _mm512_sub_epi8(_mm512_slli_epi16(codes, 3), codes); }
inline Nibbles wholes(const std::uint8_t* high, const std::uint8_t* low, const std::uint8_t* fine) {
  const Nibbles codes = planes(high, low), more = nibbles(fine);
  return {_mm512_add_epi8(seven_times(codes.low), more.low), _mm512_add_epi8(seven_times(codes.high), more.high)};
}
inline Nibbles eighths(const std::uint8_t* high) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  const __m512i mask = _mm512_set1_epi8(24);
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_slli_epi16(h, 3)), _mm256_slli_epi16(h, 1), 1);
  const __m512i odd = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_srli_epi16(h, 1)), _mm256_srli_epi16(h, 3), 1);
  return {_mm512_and_si512(both, mask), _mm512_and_si512(odd, mask)};
}
inline void bfloats4(const std::uint16_t* p, float* out) {
  const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  _mm_storeu_ps(out, _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), halves)));
}

struct Bytes {
  __m512i v;
};
inline Bytes bytes(const std::uint8_t* w) { return {_mm512_loadu_si512(w)}; }
inline I dot8(const Bytes& w, const std::int8_t* x, const std::int32_t* corrections) {
  return {_mm512_dpbusd_epi32(_mm512_loadu_si512(corrections), w.v, _mm512_loadu_si512(x))};
}

// Folds lanes 8 apart, then 4, 2, 1.
inline float sum_lanes(F x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(F x) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline void transpose4(const float* in, std::int64_t stride, float* out) {
  __m128 r0 = _mm_loadu_ps(in), r1 = _mm_loadu_ps(in + stride);
  __m128 r2 = _mm_loadu_ps(in + 2 * stride), r3 = _mm_loadu_ps(in + 3 * stride);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(out, r0);
  _mm_storeu_ps(out + 32, r1);
  _mm_storeu_ps(out + 64, r2);
  _mm_storeu_ps(out + 96, r3);
}

}  // namespace
