// Checks a ragged batch, cuts it into tiles that share key pages, and runs them.
#include <algorithm>
#include <memory>
#include <vector>

#include "attention_tiles.hpp"
#include "isa.hpp"
#include "parallel.hpp"

namespace edge {
namespace {

constexpr std::int64_t kThreadShare = 1 << 20;  // multiply-adds a thread must have to be worth starting

template <typename Element>
void append_kv(Array<Element, 6> pool, int layer, Array<const float, 2> k, Array<const float, 2> v,
               Array<const std::int32_t, 1> positions, Array<const std::int32_t, 1> sequence,
               Array<const std::int32_t, 2> tables, Array<const std::int32_t, 1> lengths) {
  const Batch b = checked_batch(positions, sequence, tables, lengths);
  const KvPool p = checked_pool(pool, layer);
  for (const auto* x : {&k, &v})
    require(static_cast<std::int64_t>(x->shape(0)) == b.rows &&
                static_cast<std::int64_t>(x->shape(1)) == p.kv_heads * p.head_dim,
            "new keys and values must have shape [rows, kv_heads * head_dim]");
  check_pages(b, p);
  for (std::int64_t r = 0; r < b.rows; ++r)
    store_row(b, p, pool.data() + layer * 2 * p.part_stride(), r, k.data(), v.data());
}

template <typename Element>
void paged_attention(Array<const float, 2> q, Array<const Element, 6> pool, int layer,
                     Array<const std::int32_t, 1> positions, Array<const std::int32_t, 1> sequence,
                     Array<const std::int32_t, 2> tables, Array<const std::int32_t, 1> lengths, Array<float, 2> out,
                     int heads, float scale, int window, float softcap, bool causal, int threads) {
  const Batch b = checked_batch(positions, sequence, tables, lengths);
  const KvPool p = checked_pool(pool, layer);
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
