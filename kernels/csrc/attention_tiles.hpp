// A ragged batch over a paged pool: its checks, where a row's keys and values go, and its tiles for `attend`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "arrays.hpp"
#include "kernel_table.hpp"

namespace edge {

struct Batch {
  const std::int32_t* positions;
  const std::int32_t* sequence;
  const std::int32_t* tables;
  const std::int32_t* lengths;
  std::int64_t rows, sequences, blocks;
};

inline Batch checked_batch(const Array<const std::int32_t, 1>& positions, const Array<const std::int32_t, 1>& sequence,
                    const Array<const std::int32_t, 2>& tables, const Array<const std::int32_t, 1>& lengths) {
  const Batch b{positions.data(), sequence.data(), tables.data(), lengths.data(),
                static_cast<std::int64_t>(positions.shape(0)), static_cast<std::int64_t>(tables.shape(0)),
                static_cast<std::int64_t>(tables.shape(1))};
  require(sequence.shape(0) == positions.shape(0), "positions and sequence must have one entry for each row");
  require(lengths.shape(0) == tables.shape(0), "block_tables and lengths must have one entry for each sequence");
  for (std::int64_t s = 0; s < b.sequences; ++s)
    require(b.lengths[s] >= 0 && b.lengths[s] <= b.blocks * kPageTokens, "a sequence is longer than its block table");
  for (std::int64_t r = 0; r < b.rows; ++r) {
    require(b.sequence[r] >= 0 && b.sequence[r] < b.sequences, "a row belongs to no sequence of the batch");
    require(b.positions[r] >= 0 && b.positions[r] < b.lengths[b.sequence[r]],
            "a row's position lies outside its sequence");
  }
  return b;
}

// fp32, or codes with a scale behind each head's: strides are of elements, floats or bytes.
struct KvPool {
  std::int64_t pages, layers, kv_heads, head_dim, head_stride;
  std::int64_t token_stride() const { return kv_heads * head_stride; }
  std::int64_t part_stride() const { return kPageTokens * token_stride(); }
  std::int64_t page_stride() const { return layers * 2 * part_stride(); }
};

template <typename Element>
KvPool checked_pool(const Array<Element, 6>& pool, int layer) {
  constexpr int extra = sizeof(Element) == 1 ? kScaleBytes : 0;
  const auto stride = static_cast<std::int64_t>(pool.shape(5));
  const KvPool p{static_cast<std::int64_t>(pool.shape(0)), static_cast<std::int64_t>(pool.shape(1)),
               static_cast<std::int64_t>(pool.shape(4)), stride - extra, stride};
  require(p.head_dim >= 4 && p.head_dim <= kMaxHeadDim && p.head_dim % 4 == 0,
          "head_dim must be a multiple of 4, at most 256");
  require(pool.shape(2) == 2 && pool.shape(3) == kPageTokens,
          "a pool has shape [pages, layers, 2, 32, kv_heads, head_dim]");
  require(layer >= 0 && layer < p.layers, "the pool has no such layer");
  return p;
}

inline void store_vector(const float* x, const KvPool& p, float* to) {
  __builtin_memcpy(to, x, static_cast<std::size_t>(p.token_stride()) * sizeof(float));
}

// The largest value of a head becomes 127 or -127. What is not finite makes the scale so, and shows in the results.
inline void store_vector(const float* x, const KvPool& p, std::int8_t* to) {
  for (std::int64_t h = 0; h < p.kv_heads; ++h, x += p.head_dim, to += p.head_stride) {
    float largest = 0.0f;
    bool finite = true;
    for (std::int64_t c = 0; c < p.head_dim; ++c) {
      const float size = std::fabs(x[c]);
      finite = finite && size <= std::numeric_limits<float>::max();
      largest = std::max(largest, size);
    }
    const float scale = finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
    const bool empty = !finite || scale == 0.0f;
    for (std::int64_t c = 0; c < p.head_dim; ++c)
      to[c] = empty ? std::int8_t{0}
                    : static_cast<std::int8_t>(std::clamp(std::nearbyint(x[c] / scale), -127.0f, 127.0f));
    __builtin_memcpy(to + p.head_dim, &scale, sizeof(scale));
  }
}

struct Shape {
  int heads, kv_heads, head_dim;
  float scale;
  int window;
  float softcap;
  bool causal;
};

inline void place(const float* keys, const float* values, const float** floats, const std::int8_t**) {
  floats[0] = keys;
  floats[1] = values;
}

inline void place(const std::int8_t* keys, const std::int8_t* values, const float**, const std::int8_t** codes) {
  codes[0] = keys;
  codes[1] = values;
}

// Consecutive rows of one sequence, a few heads at a time. A tile with few rows takes several key/value heads, so that
// it reads whole pages, but leaves work for the other threads. Adds up the work.
template <typename Element>
std::vector<AttentionTile> cut(const Batch& b, const KvPool& p, const Shape& shape, const float* q, float* out,
                               const Element* keys, int threads, std::int64_t* work) {
  std::vector<AttentionTile> tiles;
  const int group = shape.heads / shape.kv_heads;
  const int tile_heads = std::min(group, kTileQueries);
  const int tile_rows = std::max(1, kTileQueries / tile_heads);
  const std::int64_t width = static_cast<std::int64_t>(shape.heads) * shape.head_dim;
  for (std::int64_t r = 0; r < b.rows;) {
    const std::int32_t s = b.sequence[r];
    int rows = 1;
    while (rows < tile_rows && r + rows < b.rows && b.sequence[r + rows] == s) ++rows;
    int first = b.lengths[s], last = 0;
    for (int i = 0; i < rows; ++i) {
      const int until = shape.causal ? b.positions[r + i] + 1 : b.lengths[s];
      last = std::max(last, until);
      first = std::min(first, shape.causal && shape.window > 0 ? std::max(0, until - shape.window) : 0);
    }
    const std::int32_t* table = b.tables + s * b.blocks;
    for (int page = first / kPageTokens; page * kPageTokens < last; ++page)
      require(table[page] >= 0 && table[page] < p.pages, "a block table points outside the pool");
    *work += static_cast<std::int64_t>(rows) * shape.heads * (last - first) * shape.head_dim;
    const int whole_groups = group > tile_heads ? 1 : kTileQueries / (rows * group);
    const int kv_step = std::clamp(whole_groups, 1, std::max(1, shape.kv_heads / std::max(1, threads)));
    for (int kv = 0; kv < shape.kv_heads; kv += kv_step)
      for (int h = 0; h < group; h += tile_heads) {
        const std::int64_t offset = r * width + (static_cast<std::int64_t>(kv) * group + h) * shape.head_dim;
        const Element* base = keys + static_cast<std::int64_t>(kv) * p.head_stride;
        const float *floats[2] = {nullptr, nullptr};
        const std::int8_t *codes[2] = {nullptr, nullptr};
        place(base, base + p.part_stride(), floats, codes);
        tiles.push_back({q + offset, out + offset, b.positions + r, rows, std::min(kv_step, shape.kv_heads - kv),
                         std::min(tile_heads, group - h), width, shape.head_dim, floats[0], floats[1], codes[0],
                         codes[1], p.page_stride(), p.token_stride(), table, b.lengths[s], shape.scale, shape.window,
                         shape.softcap, shape.causal});
      }
    r += rows;
  }
  return tiles;
}

inline void check_pages(const Batch& b, const KvPool& p) {
  for (std::int64_t r = 0; r < b.rows; ++r) {
    const std::int32_t page = b.tables[b.sequence[r] * b.blocks + b.positions[r] / kPageTokens];
    require(page >= 0 && page < p.pages, "a block table points outside the pool");
  }
}

// Keys and values [rows, kv_heads * head_dim] of row r go into its page; `keys` is page 0 of the layer.
template <typename Element>
void store_row(const Batch& b, const KvPool& p, Element* keys, std::int64_t r, const float* k, const float* v) {
  const std::int32_t page = b.tables[b.sequence[r] * b.blocks + b.positions[r] / kPageTokens];
  Element* to = keys + page * p.page_stride() + b.positions[r] % kPageTokens * p.token_stride();
  const std::int64_t width = p.kv_heads * p.head_dim;
  store_vector(k + r * width, p, to);
  store_vector(v + r * width, p, to + p.part_stride());
}

}  // namespace edge
