// BLAKE3 of whole chunks, in parts that threads can share, and of a few bytes. Our own since the package that the rest
// of the project uses offers Python one call for a whole piece, and the threads that compute are ours, without Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge {

constexpr int kBlake3BlockBytes = 64;
constexpr int kBlake3ChunkBytes = 1024;
constexpr int kBlake3DigestBytes = 32;
constexpr int kBlake3LeafChunks = 64;  // of one part: a subtree, since it is a power of two and begins at a multiple of it
constexpr std::uint32_t kBlake3ChunkStart = 1, kBlake3ChunkEnd = 2, kBlake3Parent = 4, kBlake3Root = 8;
constexpr std::uint32_t kBlake3Start[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                                           0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
// Which word of the block each mixing step of a round takes: the permutation of the paper's table 2, applied again and again.
constexpr int kBlake3Schedule[7][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1}, {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4}, {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13},
};

// Number of parts of a piece of so many bytes, which is a multiple of 1024 and at least 2048.
std::int64_t blake3_leaves(std::int64_t bytes);

// Part `leaf` of a piece; `values` has 8 words for each part.
void blake3_leaf(const std::uint8_t* piece, std::int64_t bytes, std::int64_t leaf, std::uint32_t* values);

// Once all parts are there; overwrites `values`. Of a piece with one part it does all the work.
void blake3_finish(const std::uint8_t* piece, std::int64_t bytes, std::uint32_t* values, std::uint8_t* digest);

// Of any bytes, one block after the other: for a few.
void blake3_short(const std::uint8_t* data, std::size_t bytes, std::uint8_t* digest);

}  // namespace edge
