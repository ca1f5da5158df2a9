// Checks a ragged batch, cuts it into tiles that share key pages, and runs them.
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

struct Pool {
  std::int64_t pages, layers, kv_heads, head_dim;
  std::int64_t token_stride() const { return kv_heads * head_dim; }
  std::int64_t part_stride() const { return kPageTokens * token_stride(); }
  std::int64_t page_stride() const { return layers * 2 * part_stride(); }
};

template <typename PoolArray>
Pool checked_pool(const PoolArray& pool, int layer) {
  const Pool p{static_cast<std::int64_t>(pool.shape(0)), static_cast<std::int64_t>(pool.shape(1)),
               static_cast<std::int64_t>(pool.shape(4)), static_cast<std::int64_t>(pool.shape(5))};
  require(pool.shape(2) == 2 && pool.shape(3) == kPageTokens,
          "a pool has shape [pages, layers, 2, 32, kv_heads, head_dim]");
  require(layer >= 0 && layer < p.layers, "the pool has no such layer");
  return p;
}

void append_kv(Array<float, 6> pool, int layer, Array<const float, 2> k, Array<const float, 2> v,
               Array<const std::int32_t, 1> positions, Array<const std::int32_t, 1> sequence,
               Array<const std::int32_t, 2> tables, Array<const std::int32_t, 1> lengths) {
  const Batch b = checked_batch(positions, sequence, tables, lengths);
  const Pool p = checked_pool(pool, layer);
  for (const auto* x : {&k, &v})
    require(static_cast<std::int64_t>(x->shape(0)) == b.rows &&
                static_cast<std::int64_t>(x->shape(1)) == p.token_stride(),
            "new keys and values must have shape [rows, kv_heads * head_dim]");
  for (std::int64_t r = 0; r < b.rows; ++r) {
    const std::int32_t page = b.tables[b.sequence[r] * b.blocks + b.positions[r] / kPageTokens];
    require(page >= 0 && page < p.pages, "a block table points outside the pool");
  }
  for (std::int64_t r = 0; r < b.rows; ++r) {
    const std::int32_t page = b.tables[b.sequence[r] * b.blocks + b.positions[r] / kPageTokens];
    float* keys = pool.data() + page * p.page_stride() + layer * 2 * p.part_stride() +
                  b.positions[r] % kPageTokens * p.token_stride();
    const auto bytes = static_cast<std::size_t>(p.token_stride()) * sizeof(float);
    __builtin_memcpy(keys, k.data() + r * p.token_stride(), bytes);
    __builtin_memcpy(keys + p.part_stride(), v.data() + r * p.token_stride(), bytes);
  }
}

struct Shape {
  int heads, kv_heads, head_dim;
  float scale;
  int window;
  float softcap;
  bool causal;
};

// Consecutive rows of one sequence, a few heads at a time. A tile with few rows takes several key/value heads, so that
// it reads whole pages, but leaves work for the other threads. Adds up the work.
std::vector<AttentionTile> cut(const Batch& b, const Pool& p, const Shape& shape, const float* q, float* out,
                               const float* keys, int threads, std::int64_t* work) {
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
        const float* base = keys + static_cast<std::int64_t>(kv) * shape.head_dim;
        tiles.push_back({q + offset, out + offset, b.positions + r, rows, std::min(kv_step, shape.kv_heads - kv),
                         std::min(tile_heads, group - h), width, shape.head_dim, base, base + p.part_stride(),
                         p.page_stride(), p.token_stride(), table, b.lengths[s], shape.scale, shape.window,
                         shape.softcap, shape.causal});
      }
    r += rows;
  }
  return tiles;
}

void paged_attention(Array<const float, 2> q, Array<const float, 6> pool, int layer,
                     Array<const std::int32_t, 1> positions, Array<const std::int32_t, 1> sequence,
                     Array<const std::int32_t, 2> tables, Array<const std::int32_t, 1> lengths, Array<float, 2> out,
                     int heads, float scale, int window, float softcap, bool causal, int threads) {
  const Batch b = checked_batch(positions, sequence, tables, lengths);
  const Pool p = checked_pool(pool, layer);
  require(p.head_dim >= 4 && p.head_dim <= kMaxHeadDim && p.head_dim % 4 == 0,
          "head_dim must be a multiple of 4, at most 256");
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
  m.def("append_kv", &append_kv);
  m.def("paged_attention", &paged_attention);
}

}  // namespace edge
