// Sixteen lanes in plain C++: the path that runs anywhere. `__builtin_fmaf` rounds once, in hardware or by library.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int kQueryBlock = 1;
constexpr int kWeightRows = 1;
constexpr int kHashLanes = 4;
constexpr bool kRotatesBytesByShuffle = false;

struct F {
  float v[16];
};
struct I {
  std::int32_t v[16];
};

#define EDGE_LANES(expression)                \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r

inline F load(const float* p) { F r; EDGE_LANES(p[i]); }
inline void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
inline F set1(float x) { F r; EDGE_LANES(x); }
inline F fma(F a, F b, F c) { F r; EDGE_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
inline F add(F a, F b) { F r; EDGE_LANES(a.v[i] + b.v[i]); }
inline F sub(F a, F b) { F r; EDGE_LANES(a.v[i] - b.v[i]); }
inline F mul(F a, F b) { F r; EDGE_LANES(a.v[i] * b.v[i]); }
inline F div(F a, F b) { F r; EDGE_LANES(a.v[i] / b.v[i]); }
inline F max(F a, F b) { F r; EDGE_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F min(F a, F b) { F r; EDGE_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline I bits(F a) { I r; std::memcpy(r.v, a.v, sizeof r.v); return r; }
inline F from_bits(I a) { F r; std::memcpy(r.v, a.v, sizeof r.v); return r; }
inline I set1i(std::int32_t x) { I r; EDGE_LANES(x); }
inline I addi(I a, I b) { I r; EDGE_LANES(static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) + static_cast<std::uint32_t>(b.v[i]))); }
inline I subi(I a, I b) { I r; EDGE_LANES(static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) - static_cast<std::uint32_t>(b.v[i]))); }
inline I andi(I a, I b) { I r; EDGE_LANES(a.v[i] & b.v[i]); }
inline I ori(I a, I b) { I r; EDGE_LANES(a.v[i] | b.v[i]); }
inline I maxi(I a, I b) { I r; EDGE_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline I shift_left_23(I a) { I r; EDGE_LANES(static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << 23)); }
inline void storei(std::int32_t* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
inline F to_float(I a) { F r; EDGE_LANES(static_cast<float>(a.v[i])); }

// lane i: ws[i / 4] * xs[i / 4], and ws[i / 8] * xs[i / 8]
inline F expand4(const float* ws, const float* xs) { F r; EDGE_LANES(ws[i / 4] * xs[i / 4]); }
inline F expand2(const float* ws, const float* xs) { F r; EDGE_LANES(ws[i / 8] * xs[i / 8]); }

struct Nibbles {
  const std::uint8_t* w;
};
inline Nibbles nibbles(const std::uint8_t* w) { return {w}; }

// Codes of a group of bit-nested weights (edge_kernels/nested.py), even columns and odd ones.
struct Codes {
  std::uint8_t even[64], odd[64];
};
inline std::uint8_t two_bits(std::uint8_t byte, int place) { return static_cast<std::uint8_t>(byte >> (2 * place) & 3); }
inline Codes planes(const std::uint8_t* high, const std::uint8_t* low) {
  Codes r;
  for (int i = 0; i < 64; ++i) {
    r.even[i] = static_cast<std::uint8_t>(4 * two_bits(high[i % 32], i / 32) + two_bits(low[i % 32], i / 32));
    r.odd[i] = static_cast<std::uint8_t>(4 * two_bits(high[i % 32], 2 + i / 32) + two_bits(low[i % 32], 2 + i / 32));
  }
  return r;
}
inline Codes eighths(const std::uint8_t* high) {
  Codes r;
  for (int i = 0; i < 64; ++i) {
    r.even[i] = static_cast<std::uint8_t>(8 * two_bits(high[i % 32], i / 32));
    r.odd[i] = static_cast<std::uint8_t>(8 * two_bits(high[i % 32], 2 + i / 32));
  }
  return r;
}
// 7 times the codes and what a third plane of 4 bits, 64 bytes, adds.
inline Codes wholes(const std::uint8_t* high, const std::uint8_t* low, const std::uint8_t* fine) {
  Codes r = planes(high, low);
  for (int i = 0; i < 64; ++i) {
    r.even[i] = static_cast<std::uint8_t>(7 * r.even[i] + (fine[i] & 15));
    r.odd[i] = static_cast<std::uint8_t>(7 * r.odd[i] + (fine[i] >> 4));
  }
  return r;
}
inline I dot4(const Codes& w, const std::int8_t* x, const std::int32_t* corrections) {
  I r;
  for (int i = 0; i < 16; ++i) {
    std::int32_t sum = corrections[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += w.even[j] * x[j] + w.odd[j] * x[64 + j];
    r.v[i] = sum;
  }
  return r;
}
inline void bfloats4(const std::uint16_t* p, float* out) {
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(p[i]) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

// lane i: sum over its 4 bytes of low * even + high * odd, plus the correction
inline I dot4(Nibbles w, const std::int8_t* x, const std::int32_t* corrections) {
  I r;
  for (int i = 0; i < 16; ++i) {
    std::int32_t sum = corrections[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += (w.w[j] & 15) * x[j] + (w.w[j] >> 4) * x[64 + j];
    r.v[i] = sum;
  }
  return r;
}

struct Bytes {
  const std::uint8_t* w;
};
inline Bytes bytes(const std::uint8_t* w) { return {w}; }

// lane i: sum over its 4 bytes of (w - 128) * x; `corrections` is that sum's -128 part, for paths that need it
inline I dot8(Bytes w, const std::int8_t* x, const std::int32_t*) {
  I r;
  for (int i = 0; i < 16; ++i) {
    std::int32_t sum = 0;
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += (w.w[j] - 128) * x[j];
    r.v[i] = sum;
  }
  return r;
}

// Folds lanes 8 apart, then 4, 2, 1.
inline float sum_lanes(F x) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x.v[i] += x.v[i + width];
  return x.v[0];
}
inline float max_lanes(F x) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x.v[i] = x.v[i] > x.v[i + width] ? x.v[i] : x.v[i + width];
  return x.v[0];
}

inline void prefetch(const void*) {}

// out[c * 32 + t] = in[t * stride + c] for 4 columns c and 4 tokens t
inline void transpose4(const float* in, std::int64_t stride, float* out) {
  for (int t = 0; t < 4; ++t)
    for (int c = 0; c < 4; ++c) out[c * 32 + t] = in[t * stride + c];
}

#undef EDGE_LANES

}  // namespace
