// What every instruction set provides: plain functions on raw pointers, filled in by one translation unit each.
//
// All paths perform the same floating-point operations in the same order on 16 lanes (fused where `fma` is written), so
// their results agree bit for bit. Translation units built for an instruction set share no inline function with the
// rest, lest the linker pick a copy that an older processor can't run.
#pragma once

#include <cstdint>

namespace edge {

constexpr int kPageTokens = 32;
constexpr int kMaxHeadDim = 256;
constexpr int kScaleBytes = 4;    // behind the codes of one head of a key or value
constexpr int kTileQueries = 32;  // queries that share one pass over the pages
constexpr int kBlock = 32;

// Rows of one sequence; query heads of one key/value head, or whole groups of several.
struct AttentionTile {
  const float* q;                 // first row, first head of the tile
  float* out;                     // same place in the result
  const std::int32_t* positions;  // of each row
  int rows;
  int kv_heads;
  int heads;                  // query heads of each key/value head; kv_heads * rows * heads <= kTileQueries
  std::int64_t row_stride;    // floats between rows of q and out
  int head_dim;
  const float* keys;          // page 0, this layer and key/value head; null where they are codes
  const float* values;
  const std::int8_t* key_codes;  // the same as codes: head_dim of them, then their scale
  const std::int8_t* value_codes;
  std::int64_t page_stride;   // floats, or bytes where they are codes
  std::int64_t token_stride;
  const std::int32_t* table;
  int length;
  float scale;
  int window;
  float softcap;
  bool causal;
};

constexpr int kAttentionScratchFloats = 3 * kMaxHeadDim * kPageTokens + kTileQueries * (kMaxHeadDim + kPageTokens + 2);

// Activations of one row, quantized for an integer dot product. A group is 64 bytes of weights: 4 blocks of int4, or
// 2 blocks of int8. Blocks past the last are zero.
//   int4: codes 128 bytes a group, 64 of even then 64 of odd elements; int8: codes 64 bytes a group
//   corrections: 16 a group, minus zero point times the sum of the codes that share a 32-bit lane
//   scales: 4 (int4) or 2 (int8) a group
struct QuantizedRow {
  const std::int8_t* codes;
  const std::int32_t* corrections;
  const float* scales;
};

struct QuantizedRowOut {
  std::int8_t* codes;
  std::int32_t* corrections;
  float* scales;
};

// Of a row that bit-nested weights are multiplied with, all of a group lies together, so that one pointer (`codes`) finds
// it: 128 bytes of codes as for int4, 16 corrections, 16 scales, one for each 32-bit lane. The other pointers are not used.
constexpr int kNestedGroupBytes = 256;

// Rows of bit-nested weights (edge_kernels/nested.py), `groups` groups of 128 weights each.
struct NestedRows {
  const std::uint8_t* high;
  const std::uint8_t* low;      // null where only the first plane is read
  const std::uint8_t* fine;     // null where no third plane is read
  const std::uint16_t* scales;  // bfloat16, one for each block
  int groups;
};

constexpr int kTileOutputs = 16;
constexpr int kPanelRows = 16;

// Rows of a panel, quantized for `linear`. A block's codes, corrections and scales of all `stride` rows lie together.
// Block b of row r: codes at (b * stride + r) * 32, the others at b * stride + r. A correction is minus the zero point
// times the sum of the block's codes.
struct PanelRows {
  const std::int8_t* codes;
  const std::int32_t* corrections;
  const float* scales;
  std::int64_t stride;  // rows of the panel, at most kPanelRows
};

struct PanelRowOut {
  std::int8_t* codes;
  std::int32_t* corrections;
  float* scales;
  std::int64_t stride;
};

// Where a tile's results go: row m at y + m * stride, `outputs` of them, each times `unit` plus its bias.
struct TileOut {
  float* y;
  std::int64_t stride;
  int outputs;
  float unit;
  const float* bias;  // or null
};

enum class RowKind { rms_norm, layer_norm, add, mul, silu_mul, silu, gelu, gelu_tanh, tanh, scale, softcap };

struct RowOperation {
  RowKind kind;
  int count;  // floats of a row
  float parameter;
  const float* weight;
  const float* bias;  // or null
};

struct KernelTable {
  const char* name;
  void (*attend)(const AttentionTile&, float* scratch);  // scratch: kAttentionScratchFloats, 64-byte aligned

  // Quantize blocks [first_block, last_block) of a row; columns is the row's whole width. first_block starts a group.
  void (*quantize_int8)(const float* x, int columns, int first_block, int last_block, QuantizedRowOut out);
  void (*quantize_int4)(const float* x, int columns, int first_block, int last_block, QuantizedRowOut out);

  // y[m][n] for weight rows n in [first, last) and rows m: y + m * y_stride + n.
  void (*multiply_int8)(const std::uint8_t* data, const float* scales, int blocks, int first, int last,
                        const QuantizedRow* x, int rows, float* const* y);
  void (*multiply_int4)(const std::uint8_t* data, const float* scales, int blocks, int first, int last,
                        const QuantizedRow* x, int rows, float* const* y);
  void (*multiply_fp32)(const float* data, int columns, int first, int last, const float* const* x, int rows,
                        float* const* y);

  void (*silu_multiply)(const float* gate, const float* up, float* out, int count);
  void (*accumulate)(float* y, const float* x, float factor, int count);  // y = fma(factor, x, y)

  // A tile is `blocks` blocks of 16 outputs, and their scales: packed_matrix.hpp.
  void (*linear_int8)(const std::uint8_t* tile, int blocks, const PanelRows& x, const TileOut& out);
  void (*linear_int4)(const std::uint8_t* tile, int blocks, const PanelRows& x, const TileOut& out);
  // Tiles [column][16 outputs], as many as `out.outputs` needs, times rows x + m * x_stride.
  void (*linear_fp32)(const float* tiles, std::int64_t columns, const float* x, std::int64_t x_stride, int rows,
                      const TileOut& out);
  void (*quantize_row)(const float* x, int columns, int zero_point, const PanelRowOut& out);
  void (*row_operation)(const RowOperation& operation, const float* a, const float* b, float* out);

  // docs/noise.md: y = exp(x), and the uniforms of ids at a position
  void (*exp_all)(const double* x, double* y, std::int64_t count);
  void (*uniform_all)(std::uint64_t seed, std::uint32_t position, const std::uint32_t* ids, double* u,
                      std::int64_t count);

  // Weight rows [0, count) times rows, as above, that are groups of kNestedGroupBytes: of the first plane with rows that
  // `quantize_nested2` made, of two planes with rows that `quantize_nested4` made, of three with `quantize_nested8`'s.
  void (*quantize_nested2)(const float* x, int columns, int first_block, int last_block, QuantizedRowOut out);
  void (*quantize_nested4)(const float* x, int columns, int first_block, int last_block, QuantizedRowOut out);
  void (*multiply_nested2)(const NestedRows& weights, int count, const QuantizedRow* x, int rows, float* const* y);
  void (*multiply_nested4)(const NestedRows& weights, int count, const QuantizedRow* x, int rows, float* const* y);
  void (*quantize_nested8)(const float* x, int columns, int first_block, int last_block, QuantizedRowOut out);
  void (*multiply_nested8)(const NestedRows& weights, int count, const QuantizedRow* x, int rows, float* const* y);

  // BLAKE3, 8 words a chaining value: of chunks that follow each other, the first with this number; of pairs, in place.
  void (*blake3_chunks)(const std::uint8_t* data, int count, std::uint64_t first, std::uint32_t* values);
  void (*blake3_parents)(std::uint32_t* values, int pairs);
};

extern const KernelTable kScalarKernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#elif defined(__aarch64__)
extern const KernelTable kNeonKernels;
extern const KernelTable kNeonDotKernels;
#endif

}  // namespace edge
