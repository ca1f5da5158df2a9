// A part of a weight tile in plain C++: four outputs.
#pragma once

#include <cstdint>

namespace {

constexpr int kPart = 4;       // outputs a register holds
constexpr int kTogether = 1;   // parts whose sums are taken side by side
constexpr int kPanelStep = 2;  // most rows computed together
constexpr int kDenseTiles = 1;  // of fp32 weights, and rows, whose sums fit the registers
constexpr int kDenseRows = 2;

struct P {
  float v[4];
};

#define EDGE_PART(expression)                        \
  P r;                                               \
  for (int i = 0; i < 4; ++i) r.v[i] = (expression); \
  return r

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  // Scaling by 2^112 turns a half's exponent into a float's, subnormal halves included; scales are finite.
  return float_of_bits(static_cast<std::int32_t>(sign)) +
         float_of_bits(static_cast<std::int32_t>(sign | (magnitude << 13))) * 0x1p+112f;
}

inline P part_half(const std::uint16_t* p) { EDGE_PART(half_to_float(p[i])); }
inline P part_load(const float* p) { EDGE_PART(p[i]); }
inline void part_store(float* p, P x) { std::memcpy(p, x.v, sizeof x.v); }
inline P part_set1(float x) { EDGE_PART(x); }
inline P fma(P x, P y, P z) { EDGE_PART(__builtin_fmaf(x.v[i], y.v[i], z.v[i])); }
inline P add(P x, P y) { EDGE_PART(x.v[i] + y.v[i]); }
inline P mul(P x, P y) { EDGE_PART(x.v[i] * y.v[i]); }

struct Weights {
  std::int32_t code[4][32];  // [output][column], minus the zero point
};

struct PartInt4 {
  static constexpr int kTileBytes = 256;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int part) {
    Weights w;
    for (int o = 0; o < 4; ++o)
      for (int k = 0; k < 32; ++k)
        w.code[o][k] = (tile[k / 8 * 64 + 16 * part + 4 * o + k % 4] >> (k % 8 / 4 * 4) & 15) - 8;
    return w;
  }
  template <int J>
  static EDGE_INLINE void dot(const Weights& w, const std::int8_t* x, const std::int32_t*, P (&out)[kTogether][J]) {
    for (int j = 0; j < J; ++j)
      for (int o = 0; o < 4; ++o) {
        std::int32_t sum = 0;
        for (int k = 0; k < 32; ++k) sum += w.code[o][k] * x[32 * j + k];
        out[0][j].v[o] = static_cast<float>(sum);
      }
  }
};

struct PartInt8 : PartInt4 {
  static constexpr int kTileBytes = 512;
  static EDGE_INLINE Weights unpack(const std::uint8_t* tile, int part) {
    Weights w;
    for (int o = 0; o < 4; ++o)
      for (int k = 0; k < 32; ++k) w.code[o][k] = tile[k / 4 * 64 + 16 * part + 4 * o + k % 4] - 128;
    return w;
  }
};

#undef EDGE_PART

}  // namespace
