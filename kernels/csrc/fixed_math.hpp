// Logarithm and exponential in float64 from + - * / alone, in a fixed order (docs/noise.md): the same bits everywhere.
#pragma once

//
// Everything has internal linkage, since the file is also compiled for instruction sets that not every processor has.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

#include <cstdint>

namespace edge {
namespace {

constexpr double kLn2High = 0x1.62e42fee00000p-1;
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr double kSqrt2 = 0x1.6a09e667f3bcdp+0;
constexpr double kRounder64 = 0x1.8p+52;  // adding and subtracting it rounds to an integer, ties to even
constexpr double kNegligible = -708.0;

inline std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double double_of(std::uint64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// x must be positive and normal.
inline double fixed_log(double x) {
  const std::uint64_t bits = bits_of(x);
  double e = static_cast<double>(static_cast<std::int64_t>(bits >> 52) - 1023);
  double m = double_of((bits & 0xFFFFFFFFFFFFFu) | 0x3FF0000000000000u);
  if (m >= kSqrt2) {
    m = m * 0.5;
    e = e + 1.0;
  }
  const double f = m - 1.0;
  const double s = f / (f + 2.0);
  const double z = s * s;
  double series = 1.0 / 21;
  for (int divisor = 19; divisor >= 1; divisor -= 2) series = series * z + 1.0 / divisor;
  return e * kLn2High + ((s + s) * series + e * kLn2Low);
}

// For x at most 0 or a little above; 0 below -708.
inline double fixed_exp(double x) {
  constexpr double kFactorials[14] = {1,     1,      2,       6,        24,        120,        720,
                                      5040,  40320,  362880,  3628800,  39916800,  479001600,  6227020800.0};
  const double kept = x < kNegligible ? 0.0 : x;
  const double shifted = kept * kLog2E + kRounder64;  // its low bits are n
  const double n = shifted - kRounder64;
  const double r = (kept - n * kLn2High) - n * kLn2Low;
  double series = 1.0 / kFactorials[13];
#pragma GCC unroll 16
  for (int term = 12; term >= 0; --term) series = series * r + 1.0 / kFactorials[term];
  const double power = double_of((bits_of(shifted) + 1023) << 52);
  return x < kNegligible ? 0.0 : series * power;
}

struct Words {
  std::uint32_t first, second;
};

// Threefry-2x32, 20 rounds.
inline Words threefry(std::uint32_t k0, std::uint32_t k1, std::uint32_t c0, std::uint32_t c1) {
  constexpr int kRotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  const std::uint32_t keys[3] = {k0, k1, 0x1BD11BDAu ^ k0 ^ k1};
  std::uint32_t x0 = c0 + k0, x1 = c1 + k1;
  for (std::uint32_t group = 0; group < 5; ++group) {
    for (int i = 0; i < 4; ++i) {
      const int rotation = kRotations[(group % 2) * 4 + i];
      x0 += x1;
      x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0;
    }
    x0 += keys[(group + 1) % 3];
    x1 += keys[(group + 2) % 3] + group + 1;
  }
  return {x0, x1};
}

// (2k + 1) / 2^53, k the upper 52 bits of the two words
inline double uniform(std::uint64_t seed, std::uint32_t position, std::uint32_t id) {
  const Words w = threefry(static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32), position, id);
  const std::uint64_t k = (static_cast<std::uint64_t>(w.first) << 20) | (w.second >> 12);
  return (double_of(0x3FF0000000000000u | k) - 1.0) + 0x1p-53;  // both steps are exact
}

inline double gumbel(double u) { return -fixed_log(-fixed_log(u)); }

}  // namespace
}  // namespace edge

#pragma GCC diagnostic pop
