// One row's queries or keys before attention: norm of each head or of the whole row, then rotation, in place.
#pragma once

#include <cmath>
#include <cstdint>

namespace edge {

// Sixteen partial sums, folded in halves: the same bits however the compiler vectorises it.
inline float mean_square(const float* x, std::int64_t count) {
  float sums[16] = {};
  for (std::int64_t i = 0; i < count; ++i) sums[i % 16] += x[i] * x[i];
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0] / static_cast<float>(count);
}

inline void rms_norm(float* x, std::int64_t groups, std::int64_t width, const float* weight, float epsilon) {
  for (std::int64_t g = 0; g < groups; ++g, x += width) {
    const float inverse = 1.0f / std::sqrt(mean_square(x, width) + epsilon);
    for (std::int64_t i = 0; i < width; ++i) x[i] = x[i] * inverse * weight[i];
  }
}

inline void rotate(float* head, const float* cos, const float* sin, std::int64_t half) {
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

struct HeadsPreparation {
  std::int64_t heads, head_dim;
  const float* cos;     // [positions, half], or null: no rotation
  const float* sin;
  std::int64_t half;    // of the rotated part of a head
  const float* weight;  // or null: no norm
  std::int64_t group;   // entries of the weight: head_dim or heads * head_dim
  float epsilon;
};

inline void prepare_row(const HeadsPreparation& p, float* row, std::int32_t position) {
  if (p.weight) rms_norm(row, p.heads * p.head_dim / p.group, p.group, p.weight, p.epsilon);
  if (!p.cos) return;
  const std::int64_t offset = position * p.half;
  for (std::int64_t h = 0; h < p.heads; ++h) rotate(row + h * p.head_dim, p.cos + offset, p.sin + offset, p.half);
}

}  // namespace edge
