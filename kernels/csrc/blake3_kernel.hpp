// BLAKE3 of many blocks at once, one in each lane of a vector: whole chunks, and parents of chaining values.
// (BLAKE3, O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020: https://github.com/BLAKE3-team/BLAKE3-specs)
//
// Needs kHashLanes (a power of two from 4 to 16) and kRotatesBytesByShuffle.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "blake3.hpp"

namespace {

namespace blake3_lanes {

constexpr int W = kHashLanes;
typedef std::uint32_t V __attribute__((vector_size(4 * W)));
typedef std::uint8_t B __attribute__((vector_size(4 * W)));

template <int Bytes, std::size_t... K>
inline V rotate_bytes(V x, std::index_sequence<K...>) {
  const B bytes = reinterpret_cast<B>(x);
  return reinterpret_cast<V>(__builtin_shufflevector(bytes, bytes, (K / 4 * 4 + (K + Bytes) % 4)...));
}

template <int Bits>
inline V rotate_right(V x) {
  if constexpr (kRotatesBytesByShuffle && Bits % 8 == 0) return rotate_bytes<Bits / 8>(x, std::make_index_sequence<4 * W>{});
  return (x >> Bits) | (x << (32 - Bits));
}

inline V all(std::uint32_t x) { return V{} + x; }

// Blocks are turned four words at a time, in vectors whose 128-bit quarters hold words of one lane each. That takes one
// shuffle a result and stage, and few registers, where turning W rows at once takes two or three.
typedef std::uint32_t Quad __attribute__((vector_size(16)));

inline Quad quad(const std::uint8_t* p) {
  Quad words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// Of lanes first, first + 4, …: four words at `offset` bytes of each block.
template <int Lanes = W>
inline auto gather(const std::uint8_t* const* blocks, int first, int offset) {
  if constexpr (Lanes == 4)
    return quad(blocks[first] + offset);
  else if constexpr (Lanes == 8)
    return __builtin_shufflevector(quad(blocks[first] + offset), quad(blocks[first + 4] + offset), 0, 1, 2, 3, 4, 5, 6, 7);
  else
    return __builtin_shufflevector(gather<8>(blocks, first, offset), gather<8>(blocks, first + 8, offset), 0, 1, 2, 3, 4, 5, 6,
                                   7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Of each quarter: `Count` words of a, then of b, and so on, from word `First` on.
template <int First, int Count, std::size_t... K>
inline V zip(V a, V b, std::index_sequence<K...>) {
  constexpr int q = 4;
  return Count == 1 ? __builtin_shufflevector(a, b, (K / q * q + First + K % q / 2 + (K % 2 ? W : 0))...)
                    : __builtin_shufflevector(a, b, (K / q * q + First + K % 2 + (K % q / 2 ? W : 0))...);
}

template <int First, int Count>
inline V zip(V a, V b) {
  return zip<First, Count>(a, b, std::make_index_sequence<W>{});
}

// m[w]: word w of the block of every lane.
inline void load_blocks(const std::uint8_t* const* blocks, V* m) {
  for (int word = 0; word < 16; word += 4) {
    const V a = gather(blocks, 0, 4 * word), b = gather(blocks, 1, 4 * word);
    const V c = gather(blocks, 2, 4 * word), d = gather(blocks, 3, 4 * word);
    const V low_ab = zip<0, 1>(a, b), low_cd = zip<0, 1>(c, d), high_ab = zip<2, 1>(a, b), high_cd = zip<2, 1>(c, d);
    m[word] = zip<0, 2>(low_ab, low_cd);
    m[word + 1] = zip<2, 2>(low_ab, low_cd);
    m[word + 2] = zip<0, 2>(high_ab, high_cd);
    m[word + 3] = zip<2, 2>(high_ab, high_cd);
  }
}

inline __attribute__((always_inline)) void mix(V& a, V& b, V& c, V& d, V x, V y) {
  a = a + b + x;
  d = rotate_right<16>(d ^ a);
  c = c + d;
  b = rotate_right<12>(b ^ c);
  a = a + b + y;
  d = rotate_right<8>(d ^ a);
  c = c + d;
  b = rotate_right<7>(b ^ c);
}

template <int Round>
inline __attribute__((always_inline)) void rounds(V* v, const V* m) {
  constexpr const int* s = edge::kBlake3Schedule[Round];
  mix(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
  mix(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
  mix(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
  mix(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
  mix(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
  mix(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
  mix(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
  mix(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
  if constexpr (Round + 1 < 7) rounds<Round + 1>(v, m);
}

inline void compress(V* cv, const V* m, V counter_low, V counter_high, std::uint32_t flags) {
  V v[16] = {cv[0], cv[1], cv[2], cv[3], cv[4], cv[5], cv[6], cv[7], all(edge::kBlake3Start[0]), all(edge::kBlake3Start[1]),
             all(edge::kBlake3Start[2]), all(edge::kBlake3Start[3]), counter_low, counter_high, all(edge::kBlake3BlockBytes), all(flags)};
  rounds<0>(v, m);
  for (int i = 0; i < 8; ++i) cv[i] = v[i] ^ v[i + 8];
}

inline void start(V* cv) {
  for (int i = 0; i < 8; ++i) cv[i] = all(edge::kBlake3Start[i]);
}

inline void store(const V* cv, int lanes, std::uint32_t* values) {
  for (int lane = 0; lane < lanes; ++lane)
    for (int i = 0; i < 8; ++i) values[lane * 8 + i] = cv[i][lane];
}

}  // namespace blake3_lanes

// values[c]: the chaining value of chunk c, which is number `first` + c of what is hashed. Chunks follow each other.
void blake3_chunks(const std::uint8_t* data, int count, std::uint64_t first, std::uint32_t* values) {
  using namespace blake3_lanes;
  for (int from = 0; from < count; from += W) {
    const int lanes = count - from < W ? count - from : W;
    const bool more = count - from >= 2 * W;  // whole lanes come next: flash has just written them, so no cache has them
    const std::uint8_t* blocks[W];
    V low, high, cv[8], m[16];
    for (int lane = 0; lane < W; ++lane) {
      const int chunk = from + (lane < lanes ? lane : lanes - 1);
      blocks[lane] = data + chunk * std::int64_t{edge::kBlake3ChunkBytes};
      low[lane] = static_cast<std::uint32_t>(first + static_cast<std::uint64_t>(chunk));
      high[lane] = static_cast<std::uint32_t>((first + static_cast<std::uint64_t>(chunk)) >> 32);
    }
    start(cv);
    for (int block = 0; block < 16; ++block) {
      load_blocks(blocks, m);
      for (int lane = 0; lane < W; ++lane) {
        // In the order of addresses: that is what memory is fastest at.
        if (more) __builtin_prefetch(data + (from + W) * std::int64_t{edge::kBlake3ChunkBytes} + (block * W + lane) * 64);
        blocks[lane] += edge::kBlake3BlockBytes;
      }
      compress(cv, m, low, high, (block == 0 ? edge::kBlake3ChunkStart : 0) | (block == 15 ? edge::kBlake3ChunkEnd : 0));
    }
    store(cv, lanes, values + from * 8);
  }
}

// values[i] of `pairs` parents, from values[2 i] and values[2 i + 1], in place.
void blake3_parents(std::uint32_t* values, int pairs) {
  using namespace blake3_lanes;
  for (int from = 0; from < pairs; from += W) {
    const int lanes = pairs - from < W ? pairs - from : W;
    const std::uint8_t* blocks[W];
    V cv[8], m[16];
    for (int lane = 0; lane < W; ++lane)
      blocks[lane] = reinterpret_cast<const std::uint8_t*>(values + (from + (lane < lanes ? lane : lanes - 1)) * 16);
    start(cv);
    load_blocks(blocks, m);
    compress(cv, m, V{}, V{}, edge::kBlake3Parent);
    store(cv, lanes, values + from * 8);
  }
}

}  // namespace
