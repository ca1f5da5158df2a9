// Paged attention for one tile: rows of one sequence and some heads. Included after lanes_math.hpp.
//
// For each query and page, in page order: scores (sequential over head_dim, lanes are tokens), the page's maximum, own
// exponentials, their sum in a fixed tree, then values added token by token (lanes are channels). Nothing depends on
// which other queries share the tile; slots a query does not see are never added.
#pragma once

#include "kernel_table.hpp"

namespace {

struct Query {
  const float* q;
  float* out;
  int first;  // rows seen: [first, last)
  int last;
};

struct Scratch {
  float* keys;     // [head_dim][32]
  float* scores;   // [query][32]
  float* values;   // [query][head_dim rounded up to 16]
  float* largest;  // [query]
  float* total;    // [query]
  float* unpacked;  // [2][32][head_dim], of pages of codes
  int width;        // head_dim rounded up to 16
};

// Codes to floats: one rounding each, so that every instruction set gets the same.
inline void unpack_page(const std::int8_t* codes, std::int64_t stride, int head_dim, float* out) {
  for (int t = 0; t < edge::kPageTokens; ++t) {
    const std::int8_t* row = codes + t * stride;
    float scale;
    __builtin_memcpy(&scale, row + head_dim, sizeof(scale));
    for (int c = 0; c < head_dim; ++c) out[t * head_dim + c] = static_cast<float>(row[c]) * scale;
  }
}

inline void transpose_page(const float* keys, std::int64_t stride, int head_dim, float* out) {
  for (int c = 0; c < head_dim; c += 4)
    for (int t = 0; t < edge::kPageTokens; t += 4) transpose4(keys + t * stride + c, stride, out + c * 32 + t);
}

template <int N>
void score(const Query* queries, const float* keys, int head_dim, float* scores) {
  F low[N], high[N];
  EDGE_UNROLL
  for (int n = 0; n < N; ++n) low[n] = high[n] = set1(0.0f);
  for (int c = 0; c < head_dim; ++c) {
    const F a = load(keys + 32 * c), b = load(keys + 32 * c + 16);
    EDGE_UNROLL
    for (int n = 0; n < N; ++n) {
      const F q = set1(queries[n].q[c]);
      low[n] = fma(q, a, low[n]);
      high[n] = fma(q, b, high[n]);
    }
  }
  EDGE_UNROLL
  for (int n = 0; n < N; ++n) {
    store(scores + 32 * n, low[n]);
    store(scores + 32 * n + 16, high[n]);
  }
}

inline F cap(F scores, float softcap) { return mul(set1(softcap), tanh(div(scores, set1(softcap)))); }

// Scores -> weights of slots [from, to), 0 elsewhere; returns what the earlier pages' sums are multiplied by.
inline float weigh(float* scores, int from, int to, float scale, float softcap, float* largest, float* total) {
  F a = mul(load(scores), set1(scale)), b = mul(load(scores + 16), set1(scale));
  if (softcap > 0) {
    a = cap(a, softcap);
    b = cap(b, softcap);
  }
  if (from > 0 || to < edge::kPageTokens) {
    store(scores, a);
    store(scores + 16, b);
    for (int t = 0; t < edge::kPageTokens; ++t)
      if (t < from || t >= to) scores[t] = -__builtin_inff();
    a = load(scores);
    b = load(scores + 16);
  }
  const float page_largest = max_lanes(max(a, b));
  const float new_largest = *largest > page_largest ? *largest : page_largest;
  float corrections[16] = {*largest - new_largest};
  store(corrections, exp(load(corrections)));
  store(scores, exp(sub(a, set1(new_largest))));
  store(scores + 16, exp(sub(b, set1(new_largest))));
  if (from > 0 || to < edge::kPageTokens)
    for (int t = 0; t < edge::kPageTokens; ++t)
      if (t < from || t >= to) scores[t] = 0.0f;
  *largest = new_largest;
  *total = *total * corrections[0] + sum_lanes(add(load(scores), load(scores + 16)));
  return corrections[0];
}

// Adds slots [from, to) of a page, times their weights, to N queries' sums.
template <int N>
void add_values(const float* values, std::int64_t stride, int head_dim, int from, int to, const float* weights,
                const float* corrections, float* sums, int width) {
  for (int c = 0; c < head_dim; c += 32) {
    const int count = head_dim - c;
    F low[N], high[N];
    EDGE_UNROLL
    for (int n = 0; n < N; ++n) {
      const F correction = set1(corrections[n]);
      low[n] = mul(load(sums + n * width + c), correction);
      high[n] = mul(count > 16 ? load(sums + n * width + c + 16) : set1(0.0f), correction);
    }
    for (int t = from; t < to; ++t) {
      const float* row = values + t * stride + c;
      const F a = load_first(row, count), b = count > 16 ? load_first(row + 16, count - 16) : set1(0.0f);
      EDGE_UNROLL
      for (int n = 0; n < N; ++n) {
        const F weight = set1(weights[32 * n + t]);
        low[n] = fma(weight, a, low[n]);
        high[n] = fma(weight, b, high[n]);
      }
    }
    EDGE_UNROLL
    for (int n = 0; n < N; ++n) {
      store(sums + n * width + c, low[n]);
      if (count > 16) store(sums + n * width + c + 16, high[n]);
    }
  }
}

inline int clamp_slot(int row) { return row < 0 ? 0 : row > edge::kPageTokens ? edge::kPageTokens : row; }

// Consecutive queries [begin, end), all of which see some of the page whose first row is `page_row`.
void attend_page(const edge::AttentionTile& tile, const Query* queries, int begin, int end, int page_row,
                 const float* values, std::int64_t stride, const Scratch& s) {
  float corrections[edge::kTileQueries];
  int n = begin;
  for (; n + kQueryBlock <= end; n += kQueryBlock)
    score<kQueryBlock>(queries + n, s.keys, tile.head_dim, s.scores + 32 * n);
  for (; n < end; ++n) score<1>(queries + n, s.keys, tile.head_dim, s.scores + 32 * n);
  for (n = begin; n < end; ++n)
    corrections[n] = weigh(s.scores + 32 * n, clamp_slot(queries[n].first - page_row),
                           clamp_slot(queries[n].last - page_row), tile.scale, tile.softcap, s.largest + n, s.total + n);
  for (n = begin; n < end;) {
    const int from = clamp_slot(queries[n].first - page_row), to = clamp_slot(queries[n].last - page_row);
    bool alike = n + kQueryBlock <= end;
    for (int i = n + 1; alike && i < n + kQueryBlock; ++i)
      alike = clamp_slot(queries[i].first - page_row) == from && clamp_slot(queries[i].last - page_row) == to;
    const float* weights = s.scores + 32 * n;
    float* sums = s.values + static_cast<std::int64_t>(n) * s.width;
    if (alike) {
      add_values<kQueryBlock>(values, stride, tile.head_dim, from, to, weights, corrections + n, sums, s.width);
      n += kQueryBlock;
    } else {
      add_values<1>(values, stride, tile.head_dim, from, to, weights, corrections + n, sums, s.width);
      n += 1;
    }
  }
}

void attend(const edge::AttentionTile& tile, float* scratch) {
  const int per_head = tile.rows * tile.heads, count = tile.kv_heads * per_head;
  Scratch s;
  s.width = (tile.head_dim + 15) / 16 * 16;
  s.keys = scratch;
  s.scores = s.keys + edge::kMaxHeadDim * edge::kPageTokens;
  s.values = s.scores + edge::kTileQueries * edge::kPageTokens;
  s.largest = s.values + edge::kTileQueries * edge::kMaxHeadDim;
  s.total = s.largest + edge::kTileQueries;
  s.unpacked = s.total + edge::kTileQueries;

  Query queries[edge::kTileQueries];
  int first = INT32_MAX, last = 0;
  for (int r = 0; r < tile.rows; ++r) {
    const int position = tile.positions[r];
    const int until = tile.causal ? position + 1 : tile.length;
    const int from = tile.causal && tile.window > 0 && until > tile.window ? until - tile.window : 0;
    first = from < first ? from : first;
    last = until > last ? until : last;
    for (int kv = 0; kv < tile.kv_heads; ++kv)
      for (int h = 0; h < tile.heads; ++h) {
        const int head = kv * tile.heads + h;
        const std::int64_t offset = r * tile.row_stride + static_cast<std::int64_t>(head) * tile.head_dim;
        queries[(kv * tile.rows + r) * tile.heads + h] = {tile.q + offset, tile.out + offset, from, until};
      }
  }
  for (int n = 0; n < count; ++n) {
    s.largest[n] = -__builtin_inff();
    s.total[n] = 0.0f;
  }
  for (int i = 0; i < count * s.width; ++i) s.values[i] = 0.0f;

  const int kv_stride = tile.head_dim + (tile.key_codes != nullptr ? edge::kScaleBytes : 0);
  for (int page = first / edge::kPageTokens; page * edge::kPageTokens < last; ++page) {
    const int page_row = page * edge::kPageTokens;
    for (int kv = 0; kv < tile.kv_heads; ++kv) {
      const std::int64_t offset = tile.table[page] * tile.page_stride + static_cast<std::int64_t>(kv) * kv_stride;
      const float *keys, *values;
      std::int64_t stride = tile.token_stride;
      if (tile.key_codes == nullptr) {
        keys = tile.keys + offset;
        values = tile.values + offset;
      } else {
        float* unpacked_values = s.unpacked + edge::kPageTokens * tile.head_dim;
        unpack_page(tile.key_codes + offset, stride, tile.head_dim, s.unpacked);
        unpack_page(tile.value_codes + offset, stride, tile.head_dim, unpacked_values);
        keys = s.unpacked;
        values = unpacked_values;
        stride = tile.head_dim;
      }
      transpose_page(keys, stride, tile.head_dim, s.keys);
      const int until = (kv + 1) * per_head;
      for (int begin = kv * per_head; begin < until;) {
        int end = begin;
        while (end < until && queries[end].first < page_row + edge::kPageTokens && queries[end].last > page_row) ++end;
        if (end > begin) attend_page(tile, queries, begin, end, page_row, values, stride, s);
        begin = end > begin ? end : begin + 1;
      }
    }
  }
  for (int n = 0; n < count; ++n)
    for (int c = 0; c < tile.head_dim; c += 16)
      store_first(queries[n].out + c, div(load(s.values + n * s.width + c), set1(s.total[n])), tile.head_dim - c);
}

}  // namespace
