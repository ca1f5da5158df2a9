// Sixteen lanes as four 128-bit registers; integer dot products by SDOT where the build allows it.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

constexpr int kQueryBlock = 2;
constexpr int kWeightRows = 2;
constexpr int kHashLanes = 4;
constexpr bool kRotatesBytesByShuffle = false;

struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};

#define EDGE_LANES(expression)                      \
  for (int i = 0; i < 4; ++i) r.v[i] = (expression); \
  return r

inline F load(const float* p) { F r; EDGE_LANES(vld1q_f32(p + 4 * i)); }
inline void store(float* p, F x) { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]); }
inline F set1(float x) { F r; EDGE_LANES(vdupq_n_f32(x)); }
inline F fma(F x, F y, F z) { F r; EDGE_LANES(vfmaq_f32(z.v[i], x.v[i], y.v[i])); }
inline F add(F x, F y) { F r; EDGE_LANES(vaddq_f32(x.v[i], y.v[i])); }
inline F sub(F x, F y) { F r; EDGE_LANES(vsubq_f32(x.v[i], y.v[i])); }
inline F mul(F x, F y) { F r; EDGE_LANES(vmulq_f32(x.v[i], y.v[i])); }
inline F div(F x, F y) { F r; EDGE_LANES(vdivq_f32(x.v[i], y.v[i])); }
// compare and select: the second operand where either is NaN, as on x86
inline F max(F x, F y) { F r; EDGE_LANES(vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
inline F min(F x, F y) { F r; EDGE_LANES(vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
inline I bits(F x) { I r; EDGE_LANES(vreinterpretq_s32_f32(x.v[i])); }
inline F from_bits(I x) { F r; EDGE_LANES(vreinterpretq_f32_s32(x.v[i])); }
inline I set1i(std::int32_t x) { I r; EDGE_LANES(vdupq_n_s32(x)); }
inline I addi(I x, I y) { I r; EDGE_LANES(vaddq_s32(x.v[i], y.v[i])); }
inline I subi(I x, I y) { I r; EDGE_LANES(vsubq_s32(x.v[i], y.v[i])); }
inline I andi(I x, I y) { I r; EDGE_LANES(vandq_s32(x.v[i], y.v[i])); }
inline I ori(I x, I y) { I r; EDGE_LANES(vorrq_s32(x.v[i], y.v[i])); }
inline I maxi(I x, I y) { I r; EDGE_LANES(vmaxq_s32(x.v[i], y.v[i])); }
inline I shift_left_23(I x) { I r; EDGE_LANES(vshlq_n_s32(x.v[i], 23)); }
inline void storei(std::int32_t* p, I x) { for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, x.v[i]); }
inline F to_float(I x) { F r; EDGE_LANES(vcvtq_f32_s32(x.v[i])); }

inline F expand4(const float* ws, const float* xs) { F r; EDGE_LANES(vdupq_n_f32(ws[i] * xs[i])); }
inline F expand2(const float* ws, const float* xs) { F r; EDGE_LANES(vdupq_n_f32(ws[i / 2] * xs[i / 2])); }

inline int32x4_t dot(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, w, x);
#else
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
  const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(x)));
  return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
}

struct Nibbles {
  int8x16_t low[4], high[4];
};
inline Nibbles nibbles(const std::uint8_t* w) {
  Nibbles r;
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t both = vld1q_u8(w + 16 * i);
    r.low[i] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
    r.high[i] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
  }
  return r;
}
inline I dot4(const Nibbles& w, const std::int8_t* x, const std::int32_t* corrections) {
  I r;
  for (int i = 0; i < 4; ++i) {
    const int32x4_t even = dot(vld1q_s32(corrections + 4 * i), w.low[i], vld1q_s8(x + 16 * i));
    r.v[i] = dot(even, w.high[i], vld1q_s8(x + 64 + 16 * i));
  }
  return r;
}

// Two planes of 2 bits, 32 bytes each, to the codes of a group (edge_kernels/nested.py); and 8 times those of one.
inline Nibbles planes(const std::uint8_t* high, const std::uint8_t* low) {
  Nibbles r;
  const uint8x16_t first = vdupq_n_u8(0x33), second = vdupq_n_u8(0xCC), mask = vdupq_n_u8(15);
  for (int i = 0; i < 2; ++i) {
    const uint8x16_t h = vld1q_u8(high + 16 * i), l = vld1q_u8(low + 16 * i);
    const uint8x16_t a = vorrq_u8(vshlq_n_u8(vandq_u8(h, first), 2), vandq_u8(l, first));
    const uint8x16_t b = vorrq_u8(vandq_u8(h, second), vandq_u8(vshrq_n_u8(l, 2), first));
    r.low[i] = vreinterpretq_s8_u8(vandq_u8(a, mask));
    r.low[i + 2] = vreinterpretq_s8_u8(vandq_u8(b, mask));
    r.high[i] = vreinterpretq_s8_u8(vshrq_n_u8(a, 4));
    r.high[i + 2] = vreinterpretq_s8_u8(vshrq_n_u8(b, 4));
  }
  return r;
}
// 7 times the codes and what a third plane of 4 bits, 64 bytes, adds.
inline int8x16_t whole(int8x16_t code, int8x16_t fine) {
  return vaddq_s8(vsubq_s8(vshlq_n_s8(code, 3), code), fine);
}
inline Nibbles wholes(const std::uint8_t* high, const std::uint8_t* low, const std::uint8_t* fine) {
  Nibbles r = planes(high, low);
  const Nibbles more = nibbles(fine);
  for (int i = 0; i < 4; ++i) {
    r.low[i] = whole(r.low[i], more.low[i]);
    r.high[i] = whole(r.high[i], more.high[i]);
  }
  return r;
}
inline Nibbles eighths(const std::uint8_t* high) {
  Nibbles r;
  const uint8x16_t mask = vdupq_n_u8(24);
  for (int i = 0; i < 2; ++i) {
    const uint8x16_t h = vld1q_u8(high + 16 * i);
    r.low[i] = vreinterpretq_s8_u8(vandq_u8(vshlq_n_u8(h, 3), mask));
    r.low[i + 2] = vreinterpretq_s8_u8(vandq_u8(vshlq_n_u8(h, 1), mask));
    r.high[i] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(h, 1), mask));
    r.high[i + 2] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(h, 3), mask));
  }
  return r;
}
inline void bfloats4(const std::uint16_t* p, float* out) {
  vst1q_f32(out, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)));
}

struct Bytes {
  int8x16_t v[4];
};
inline Bytes bytes(const std::uint8_t* w) {
  Bytes r;
  EDGE_LANES(vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 16 * i), vdupq_n_u8(128))));
}
inline I dot8(const Bytes& w, const std::int8_t* x, const std::int32_t*) {
  I r;
  EDGE_LANES(dot(vdupq_n_s32(0), w.v[i], vld1q_s8(x + 16 * i)));
}

inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }

// Folds lanes 8 apart, then 4, 2, 1.
inline float sum_lanes(F x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float max_lanes(F x) {
  const float32x4_t four = larger(larger(x.v[0], x.v[2]), larger(x.v[1], x.v[3]));
  const float32x4_t two = larger(four, vextq_f32(four, four, 2));
  return vgetq_lane_f32(larger(two, vdupq_n_f32(vgetq_lane_f32(two, 1))), 0);
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

inline void transpose4(const float* in, std::int64_t stride, float* out) {
  const float32x4x2_t a = vtrnq_f32(vld1q_f32(in), vld1q_f32(in + stride));
  const float32x4x2_t b = vtrnq_f32(vld1q_f32(in + 2 * stride), vld1q_f32(in + 3 * stride));
  vst1q_f32(out, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
  vst1q_f32(out + 32, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
  vst1q_f32(out + 64, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
  vst1q_f32(out + 96, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
}

#undef EDGE_LANES

}  // namespace
