// What happens to one row between matrix products: norms, activations, sums. Included after lanes_math.hpp.
//
// Sums of a row are kept in sixteen lanes and folded in halves at the end.
#pragma once

#include "kernel_table.hpp"

namespace {

inline float sum_of_squares(const float* x, int count, float mean) {
  F sums = set1(0.0f);
  const int whole = count / 16 * 16;
  for (int i = 0; i < whole; i += 16) {
    const F centred = sub(load(x + i), set1(mean));
    sums = fma(centred, centred, sums);
  }
  if (const int rest = count - whole) {
    float v[16] = {};
    for (int i = 0; i < rest; ++i) v[i] = x[whole + i] - mean;
    sums = fma(load(v), load(v), sums);
  }
  return sum_lanes(sums);
}

inline float sum_of(const float* x, int count) {
  F sums = set1(0.0f);
  for (int i = 0; i < count; i += 16) sums = add(sums, load_first(x + i, count - i));
  return sum_lanes(sums);
}

// Abramowitz and Stegun 7.1.26: within 1.5e-7 of erf.
inline F erf(F x) {
  const I sign = andi(bits(x), set1i(INT32_MIN));
  const F magnitude = from_bits(andi(bits(x), set1i(INT32_MAX)));
  const F t = div(set1(1.0f), fma(set1(0.3275911f), magnitude, set1(1.0f)));
  F p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const F e = exp(sub(set1(0.0f), mul(magnitude, magnitude)));
  const F y = sub(set1(1.0f), mul(mul(p, t), e));
  return from_bits(ori(andi(bits(y), set1i(INT32_MAX)), sign));
}

inline F gelu(F x) { return mul(mul(set1(0.5f), x), add(set1(1.0f), erf(mul(x, set1(0.70710678f))))); }
inline F gelu_tanh(F x) {
  const F cubic = mul(mul(mul(set1(0.044715f), x), x), x);
  return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(mul(set1(0.79788456f), add(x, cubic)))));
}

template <typename Function>
inline void each(const float* a, float* out, int count, Function function) {
  const int whole = count / 16 * 16;
  for (int i = 0; i < whole; i += 16) store(out + i, function(load(a + i)));
  if (whole < count) store_first(out + whole, function(load_first(a + whole, count - whole)), count - whole);
}

template <typename Function>
inline void each(const float* a, const float* b, float* out, int count, Function function) {
  const int whole = count / 16 * 16;
  for (int i = 0; i < whole; i += 16) store(out + i, function(load(a + i), load(b + i)));
  if (whole < count)
    store_first(out + whole, function(load_first(a + whole, count - whole), load_first(b + whole, count - whole)),
                count - whole);
}

inline void norm(const float* x, float mean, float variance, const edge::RowOperation& o, float* out) {
  const F inverse = set1(1.0f / __builtin_sqrtf(variance + o.parameter)), middle = set1(mean);
  each(x, o.weight, out, o.count, [&](F a, F w) { return mul(mul(sub(a, middle), inverse), w); });
  if (o.bias) each(out, o.bias, out, o.count, [](F a, F b) { return add(a, b); });
}

void row_operation(const edge::RowOperation& o, const float* a, const float* b, float* out) {
  const int n = o.count;
  const F parameter = set1(o.parameter);
  switch (o.kind) {
    case edge::RowKind::rms_norm:
      return norm(a, 0.0f, sum_of_squares(a, n, 0.0f) / static_cast<float>(n), o, out);
    case edge::RowKind::layer_norm: {
      const float mean = sum_of(a, n) / static_cast<float>(n);
      return norm(a, mean, sum_of_squares(a, n, mean) / static_cast<float>(n), o, out);
    }
    case edge::RowKind::add:
      return each(a, b, out, n, [](F x, F y) { return add(x, y); });
    case edge::RowKind::mul:
      return each(a, b, out, n, [](F x, F y) { return mul(x, y); });
    case edge::RowKind::silu_mul:
      return each(a, b, out, n, [](F x, F y) { return mul(silu(x), y); });
    case edge::RowKind::silu:
      return each(a, out, n, [](F x) { return silu(x); });
    case edge::RowKind::gelu:
      return each(a, out, n, [](F x) { return gelu(x); });
    case edge::RowKind::gelu_tanh:
      return each(a, out, n, [](F x) { return gelu_tanh(x); });
    case edge::RowKind::tanh:
      return each(a, out, n, [](F x) { return tanh(x); });
    case edge::RowKind::scale:
      return each(a, out, n, [&](F x) { return mul(x, parameter); });
    case edge::RowKind::softcap:
      return each(a, out, n, [&](F x) { return mul(parameter, tanh(div(x, parameter))); });
  }
}

}  // namespace
