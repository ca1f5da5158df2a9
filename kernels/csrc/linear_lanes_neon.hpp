// A part of a weight tile in 128-bit registers: four outputs.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

constexpr int kPart = 4;       // outputs a register holds
constexpr int kTogether = 1;   // parts whose sums are taken side by side
constexpr int kPanelStep = 8;  // most rows computed together
constexpr int kDenseTiles = 1;  // of fp32 weights, and rows, whose sums fit the registers
constexpr int kDenseRows = 4;

struct P {
  float32x4_t v;
};

inline P part_half(const std::uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
inline P part_load(const float* p) { return {vld1q_f32(p)}; }
inline void part_store(float* p, P x) { vst1q_f32(p, x.v); }
inline P part_set1(float x) { return {vdupq_n_f32(x)}; }
inline P fma(P x, P y, P z) { return {vfmaq_f32(z.v, x.v, y.v)}; }
inline P add(P x, P y) { return {vaddq_f32(x.v, y.v)}; }
inline P mul(P x, P y) { return {vmulq_f32(x.v, y.v)}; }

struct Weights {
  int8x16_t group[8];  // 4 columns of 4 outputs each
};

inline int8x16_t four_columns(const std::int8_t* x) {
  std::int32_t four;
  __builtin_memcpy(&four, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

template <int J>
EDGE_INLINE void dot_block(const Weights& w, const std::int8_t* x, const int32x4_t (&start)[J],
                           P (&out)[kTogether][J]) {
  EDGE_UNROLL
  for (int j = 0; j < J; ++j) {
    int32x4_t sums = start[j];
#if defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t low = vld1q_s8(x + 32 * j), high = vld1q_s8(x + 32 * j + 16);
    sums = vdotq_laneq_s32(sums, w.group[0], low, 0);
    sums = vdotq_laneq_s32(sums, w.group[1], low, 1);
    sums = vdotq_laneq_s32(sums, w.group[2], low, 2);
    sums = vdotq_laneq_s32(sums, w.group[3], low, 3);
    sums = vdotq_laneq_s32(sums, w.group[4], high, 0);
    sums = vdotq_laneq_s32(sums, w.group[5], high, 1);
    sums = vdotq_laneq_s32(sums, w.group[6], high, 2);
    sums = vdotq_laneq_s32(sums, w.group[7], high, 3);
#else
    EDGE_UNROLL
    for (int g = 0; g < 8; ++g) sums = dot(sums, w.group[g], four_columns(x + 32 * j + 4 * g));
#endif
    out[0][j] = {vcvtq_f32_s32(sums)};
  }
}

struct PartInt4 {
  static constexpr int kTileBytes = 256;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int part) {
    Weights w;
    EDGE_UNROLL
    for (int c = 0; c < 4; ++c) {
      const uint8x16_t both = vld1q_u8(tile + 64 * c + 16 * part);
      w.group[2 * c] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      w.group[2 * c + 1] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
    return w;
  }
  template <int J>
  static EDGE_INLINE void dot(const Weights& w, const std::int8_t* x, const std::int32_t* corrections,
                              P (&out)[kTogether][J]) {
    int32x4_t start[J];
    EDGE_UNROLL
    for (int j = 0; j < J; ++j) start[j] = vdupq_n_s32(corrections[j]);
    dot_block(w, x, start, out);
  }
};

struct PartInt8 {
  static constexpr int kTileBytes = 512;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int part) {
    Weights w;
    EDGE_UNROLL
    for (int g = 0; g < 8; ++g)
      w.group[g] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(tile + 64 * g + 16 * part), vdupq_n_u8(128)));
    return w;
  }
  template <int J>
  static EDGE_INLINE void dot(const Weights& w, const std::int8_t* x, const std::int32_t*, P (&out)[kTogether][J]) {
    int32x4_t start[J];
    EDGE_UNROLL
    for (int j = 0; j < J; ++j) start[j] = vdupq_n_s32(0);
    dot_block(w, x, start, out);
  }
};

}  // namespace
