// Sixteen lanes as two 256-bit registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kQueryBlock = 2;
constexpr int kWeightRows = 2;
constexpr int kHashLanes = 8;
constexpr bool kRotatesBytesByShuffle = true;

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};

inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline I bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline F from_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I set1i(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I addi(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I subi(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I andi(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I ori(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline I maxi(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline I shift_left_23(I x) { return {_mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23)}; }
inline void storei(std::int32_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

inline F expand4(const float* ws, const float* xs) {
  const __m256 s = _mm256_castps128_ps256(_mm_mul_ps(_mm_loadu_ps(ws), _mm_loadu_ps(xs)));
  return {_mm256_permutevar8x32_ps(s, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
          _mm256_permutevar8x32_ps(s, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
}
inline F expand2(const float* ws, const float* xs) {
  return {_mm256_set1_ps(ws[0] * xs[0]), _mm256_set1_ps(ws[1] * xs[1])};
}

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

struct Nibbles {
  __m256i low_a, low_b, high_a, high_b;
};
inline Nibbles nibbles(const std::uint8_t* w) {
  const __m256i mask = _mm256_set1_epi8(15), a = load256(w), b = load256(w + 32);
  return {_mm256_and_si256(a, mask), _mm256_and_si256(b, mask),
          _mm256_and_si256(_mm256_srli_epi16(a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)};
}

// 2 * 2 * 15 * 127 fits 16 bits, so the two halves add before they widen.
inline __m256i dot_half(__m256i low, __m256i high, const std::int8_t* x, const std::int32_t* correction) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, load256(x)), _mm256_maddubs_epi16(high, load256(x + 64)));
  return _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), load256(correction));
}
inline I dot4(const Nibbles& w, const std::int8_t* x, const std::int32_t* corrections) {
  return {dot_half(w.low_a, w.high_a, x, corrections), dot_half(w.low_b, w.high_b, x + 32, corrections + 8)};
}

struct Bytes {
  __m256i a, b;
};
inline Bytes bytes(const std::uint8_t* w) {
  const __m256i zero_point = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(load256(w), zero_point), _mm256_xor_si256(load256(w + 32), zero_point)};
}
// |w| as unsigned times x with w's sign: 2 * 128 * 127 fits 16 bits.
inline __m256i dot_signed(__m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
inline I dot8(const Bytes& w, const std::int8_t* x, const std::int32_t*) {
  return {dot_signed(w.a, load256(x)), dot_signed(w.b, load256(x + 32))};
}

// Folds lanes 8 apart, then 4, 2, 1.
inline float sum_lanes(F x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(F x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
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
