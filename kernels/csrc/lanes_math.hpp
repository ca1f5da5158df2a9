// Functions on sixteen lanes, the same operations for every instruction set. Included after a lanes_*.hpp.
#pragma once

#include <cstdint>

namespace {

// Loops over a few registers must be unrolled, or compilers keep the registers in memory.
#if defined(__clang__)
#define EDGE_UNROLL _Pragma("unroll")
#else
#define EDGE_UNROLL _Pragma("GCC unroll 16")
#endif

// What passes registers by the dozen must not become a call.
#define EDGE_INLINE inline __attribute__((always_inline))

inline float float_of_bits(std::int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The first `count` floats, zeros after them; reads no others.
inline F load_first(const float* p, int count) {
  if (count >= 16) return load(p);
  float v[16] = {};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return load(v);
}

inline void store_first(float* p, F x, int count) {
  if (count >= 16) return store(p, x);
  float v[16];
  store(v, x);
  for (int i = 0; i < count; ++i) p[i] = v[i];
}

// Adding 1.5 * 2^23 leaves the rounded integer in the low bits (ties to even), for |x| < 2^22.
constexpr float kRounder = 12582912.0f;
inline I round_to_int(F x) { return subi(bits(add(x, set1(kRounder))), bits(set1(kRounder))); }

// e^x within 2 units in the last place for x in [-87.3, 88.3], clamped outside, NaN for NaN.
inline F exp(F x) {
  x = min(set1(88.3f), max(set1(-87.3f), x));
  const F shifted = add(mul(x, set1(1.44269504f)), set1(kRounder));
  const F n = sub(shifted, set1(kRounder));
  F r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  const I exponent = subi(bits(shifted), bits(set1(kRounder)));
  return mul(p, from_bits(shift_left_23(addi(exponent, set1i(127)))));
}

// sign(x) * (1 - e^-2|x|) / (1 + e^-2|x|)
inline F tanh(F x) {
  const I sign = andi(bits(x), set1i(INT32_MIN));
  const F magnitude = from_bits(andi(bits(x), set1i(INT32_MAX)));
  const F e = exp(mul(magnitude, set1(-2.0f)));
  const F t = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  return from_bits(ori(bits(t), sign));
}

inline F silu(F x) { return div(x, add(set1(1.0f), exp(sub(set1(0.0f), x)))); }

}  // namespace
