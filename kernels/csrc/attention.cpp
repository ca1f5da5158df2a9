// Checks a ragged batch, cuts it into tiles that share key pages, and runs them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "arrays.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace edge {
namespace {

constexpr std::int64_t kThreadShare = 1 << 20;  // multiply-adds a thread must have to be worth starting

struct Batch {
  const std::int32_t* positions;
  const std::int32_t* sequence;
  const std::int32_t* tables;
  const std::int32_t* lengths;
  std::int64_t rows, sequences, blocks;
};

Batch checked_batch(const Array<const std::int32_t, 1>& positions, const Array<const std::int32_t, 1>& sequence,
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
struct Pool {
  std::int64_t pages, layers, kv_heads, head_dim, head_stride;
  std::int64_t token_stride() const { return kv_heads * head_stride; }
  std::int64_t part_stride() const { return kPageTokens * token_stride(); }
  std::int64_t page_stride() const { return layers * 2 * part_stride(); }
};

template <typename Element>
Pool checked_pool(const Array<Element, 6>& pool, int layer) {
  constexpr int extra = sizeof(Element) == 1 ? kScaleBytes : 0;
  const auto stride = static_cast<std::int64_t>(pool.shape(5));
  const Pool p{static_cast<std::int64_t>(pool.shape(0)), static_cast<std::int64_t>(pool.shape(1)),
               static_cast<std::int64_t>(pool.shape(4)), stride - extra, stride};
  require(p.head_dim >= 4 && p.head_dim <= kMaxHeadDim && p.head_dim % 4 == 0,
          "head_dim must be a multiple of 4, at most 256");
  require(pool.shape(2) == 2 && pool.shape(3) == kPageTokens,
          "a pool has shape [pages, layers, 2, 32, kv_heads, head_dim]");
  require(layer >= 0 && layer < p.layers, "the pool has no such layer");
  return p;
}

void store_vector(const float* x, const Pool& p, float* to) {
  __builtin_memcpy(to, x, static_cast<std::size_t>(p.token_stride()) * sizeof(float));
}

// The largest value of a head becomes 127 or -127. What is not finite makes the scale so, and shows in the results.
void store_vector(const float* x, const Pool& p, std::int8_t* to) {
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

template <typename Element>
void append_kv(Array<Element, 6> pool, int layer, Array<const float, 2> k, Array<const float, 2> v,
               Array<const std::int32_t, 1> positions, Array<const std::int32_t, 1> sequence,
               Array<const std::int32_t, 2> tables, Array<const std::int32_t, 1> lengths) {
  const Batch b = checked_batch(positions, sequence, tables, lengths);
  const Pool p = checked_pool(pool, layer);
  for (const auto* x : {&k, &v})
    require(static_cast<std::int64_t>(x->shape(0)) == b.rows &&
                static_cast<std::int64_t>(x->shape(1)) == p.kv_heads * p.head_dim,
            "new keys and values must have shape [rows, kv_heads * head_dim]");
  for (std::int64_t r = 0; r < b.rows; ++r) {
    const std::int32_t page = b.tables[b.sequence[r] * b.blocks + b.positions[r] / kPageTokens];
    require(page >= 0 && page < p.pages, "a block table points outside the pool");
  }
  for (std::int64_t r = 0; r < b.rows; ++r) {
    const std::int32_t page = b.tables[b.sequence[r] * b.blocks + b.positions[r] / kPageTokens];
    Element* keys = pool.data() + page * p.page_stride() + layer * 2 * p.part_stride() +
                  b.positions[r] % kPageTokens * p.token_stride();
    const std::int64_t width = p.kv_heads * p.head_dim;
    store_vector(k.data() + r * width, p, keys);
    store_vector(v.data() + r * width, p, keys + p.part_stride());
  }
}

struct Shape {
  int heads, kv_heads, head_dim;
  float scale;
  int window;
  float softcap;
  bool causal;
};

void place(const float* keys, const float* values, const float** floats, const std::int8_t**) {
  floats[0] = keys;
  floats[1] = values;
}

void place(const std::int8_t* keys, const std::int8_t* values, const float**, const std::int8_t** codes) {
  codes[0] = keys;
  codes[1] = values;
}

// Consecutive rows of one sequence, a few heads at a time. A tile with few rows takes several key/value heads, so that
// it reads whole pages, but leaves work for the other threads. Adds up the work.
template <typename Element>
std::vector<AttentionTile> cut(const Batch& b, const Pool& p, const Shape& shape, const float* q, float* out,
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

template <typename Element>
void paged_attention(Array<const float, 2> q, Array<const Element, 6> pool, int layer,
                     Array<const std::int32_t, 1> positions, Array<const std::int32_t, 1> sequence,
                     Array<const std::int32_t, 2> tables, Array<const std::int32_t, 1> lengths, Array<float, 2> out,
                     int heads, float scale, int window, float softcap, bool causal, int threads) {
  const Batch b = checked_batch(positions, sequence, tables, lengths);
  const Pool p = checked_pool(pool, layer);
  require(p.kv_heads >= 1 && heads >= p.kv_heads && heads % p.kv_heads == 0,
          "query heads must be a multiple of the key/value heads");
  const auto width = static_cast<std::size_t>(heads) * static_cast<std::size_t>(p.head_dim);
  require(static_cast<std::int64_t>(q.shape(0)) == b.rows && q.shape(1) == width,
          "queries must have shape [rows, heads * head_dim]");
  require(out.shape(0) == q.shape(0) && out.shape(1) == width, "the result must have the queries' shape");
  require(window >= 0, "a window is 0 (none) or the number of rows seen");
  const Shape shape{heads, static_cast<int>(p.kv_heads), static_cast<int>(p.head_dim), scale, window, softcap, causal};
  std::int64_t work = 0;
  const std::vector<AttentionTile> tiles =
      cut(b, p, shape, q.data(), out.data(), pool.data() + layer * 2 * p.part_stride(), threads, &work);
  const int used = std::min<int>(threads_worth(threads, work, kThreadShare), std::max<int>(1, static_cast<int>(tiles.size())));
  const std::unique_ptr<float[]> scratch(new float[static_cast<std::size_t>(used) * kAttentionScratchFloats]);
  const KernelTable& table = kernels();
  nb::gil_scoped_release released;
  run_phases(used, {static_cast<std::int64_t>(tiles.size())}, [&](int, std::int64_t item, int thread) {
    table.attend(tiles[static_cast<std::size_t>(item)], scratch.get() + thread * kAttentionScratchFloats);
  });
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("append_kv", &append_kv<float>);
  m.def("append_kv_codes", &append_kv<std::int8_t>);
  m.def("paged_attention", &paged_attention<float>);
  m.def("paged_attention_codes", &paged_attention<std::int8_t>);
}

}  // namespace edge
