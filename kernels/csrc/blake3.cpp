#include "blake3.hpp"

#include <algorithm>
#include <cstring>

#include "arrays.hpp"
#include "isa.hpp"

namespace edge {
namespace {

constexpr std::int64_t kLeafBytes = std::int64_t{kBlake3LeafChunks} * kBlake3ChunkBytes;

std::uint32_t rotate_right(std::uint32_t x, int bits) { return (x >> bits) | (x << (32 - bits)); }

void mix(std::uint32_t* v, int a, int b, int c, int d, std::uint32_t x, std::uint32_t y) {
  v[a] += v[b] + x;
  v[d] = rotate_right(v[d] ^ v[a], 16);
  v[c] += v[d];
  v[b] = rotate_right(v[b] ^ v[c], 12);
  v[a] += v[b] + y;
  v[d] = rotate_right(v[d] ^ v[a], 8);
  v[c] += v[d];
  v[b] = rotate_right(v[b] ^ v[c], 7);
}

// cv becomes the next chaining value, or the first half of the root's output.
void compress(std::uint32_t* cv, const std::uint32_t* m, std::uint64_t counter, std::uint32_t bytes, std::uint32_t flags) {
  std::uint32_t v[16];
  std::memcpy(v, cv, 32);
  std::memcpy(v + 8, kBlake3Start, 16);
  v[12] = static_cast<std::uint32_t>(counter);
  v[13] = static_cast<std::uint32_t>(counter >> 32);
  v[14] = bytes;
  v[15] = flags;
  for (const int* s : kBlake3Schedule) {
    for (int i = 0; i < 4; ++i) mix(v, i, 4 + i, 8 + i, 12 + i, m[s[2 * i]], m[s[2 * i + 1]]);
    for (int i = 0; i < 4; ++i)
      mix(v, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
  }
  for (int i = 0; i < 8; ++i) cv[i] = v[i] ^ v[i + 8];
}

// The chaining value of the subtree of `bytes` bytes from chunk `first` on; of the root: the digest.
void subtree(const std::uint8_t* data, std::size_t bytes, std::uint64_t first, std::uint32_t root, std::uint32_t* cv) {
  std::uint32_t m[16];
  std::memcpy(cv, kBlake3Start, 32);
  if (bytes > kBlake3ChunkBytes) {
    std::size_t left = kBlake3ChunkBytes;
    while (2 * left < bytes) left *= 2;
    subtree(data, left, first, 0, m);
    subtree(data + left, bytes - left, first + left / kBlake3ChunkBytes, 0, m + 8);
    return compress(cv, m, 0, kBlake3BlockBytes, kBlake3Parent | root);
  }
  for (std::size_t from = 0; from == 0 || from < bytes; from += kBlake3BlockBytes) {
    const std::size_t count = std::min<std::size_t>(kBlake3BlockBytes, bytes - from);
    std::memset(m, 0, sizeof m);
    if (count) std::memcpy(m, data + from, count);
    const bool is_last = from + kBlake3BlockBytes >= bytes;
    compress(cv, m, first, static_cast<std::uint32_t>(count),
             (from == 0 ? kBlake3ChunkStart : 0) | (is_last ? kBlake3ChunkEnd | root : 0));
  }
}

// Level after level, whoever is left over goes up as it is, until `wanted` values are left.
void reduce(std::uint32_t* values, std::int64_t count, std::int64_t wanted) {
  while (count > wanted) {
    kernels().blake3_parents(values, static_cast<int>(count / 2));
    if (count % 2) std::memmove(values + count / 2 * 8, values + (count - 1) * 8, 32);
    count = (count + 1) / 2;
  }
}

void root(std::uint32_t* values, std::int64_t count, std::uint8_t* digest) {
  reduce(values, count, 2);
  std::uint32_t cv[8];
  std::memcpy(cv, kBlake3Start, 32);
  compress(cv, values, 0, kBlake3BlockBytes, kBlake3Parent | kBlake3Root);
  std::memcpy(digest, cv, kBlake3DigestBytes);
}

}  // namespace

std::int64_t blake3_leaves(std::int64_t bytes) { return (bytes + kLeafBytes - 1) / kLeafBytes; }

void blake3_leaf(const std::uint8_t* piece, std::int64_t bytes, std::int64_t leaf, std::uint32_t* values) {
  if (blake3_leaves(bytes) == 1) return;  // its last parent is the root: blake3_finish
  const std::int64_t from = leaf * kLeafBytes;
  const std::int64_t chunks = std::min(kLeafBytes, bytes - from) / kBlake3ChunkBytes;
  std::uint32_t own[kBlake3LeafChunks * 8];
  kernels().blake3_chunks(piece + from, static_cast<int>(chunks), static_cast<std::uint64_t>(from / kBlake3ChunkBytes), own);
  reduce(own, chunks, 1);
  std::memcpy(values + leaf * 8, own, 32);
}

void blake3_finish(const std::uint8_t* piece, std::int64_t bytes, std::uint32_t* values, std::uint8_t* digest) {
  const std::int64_t leaves = blake3_leaves(bytes);
  if (leaves > 1) return root(values, leaves, digest);
  const std::int64_t chunks = bytes / kBlake3ChunkBytes;
  std::uint32_t own[kBlake3LeafChunks * 8];
  kernels().blake3_chunks(piece, static_cast<int>(chunks), 0, own);
  root(own, chunks, digest);
}

void blake3_short(const std::uint8_t* data, std::size_t bytes, std::uint8_t* digest) {
  std::uint32_t cv[8];
  subtree(data, bytes, 0, kBlake3Root, cv);
  std::memcpy(digest, cv, kBlake3DigestBytes);
}

}  // namespace edge
