// The search on CUDA: its parameters, the layout of packed operands, and how a launch is described. Kernels are in
// nearest_*.cuh, nearest.cu launches them; docs/cuda_nearest.md tells the whole story.
//
// Screen units: a row is a = 2^p (x - c), a code b = 2^q (e - c) (c: a mean code for "l2", else 0; "cosine": b = 2^14 e / |e|),
// both float16; the score to maximise is t = a.b - f |b|^2 / 2 with f = 2^(p-q) ("l2"), or a.b. Where the padded contraction has
// three dims to spare, "folded", they hold the bias: f 2^18 on the row's side, 2^-18 |b|^2 / 2 in three float16 on the code's.
#ifndef VQK_CUDA_NEAREST_H
#define VQK_CUDA_NEAREST_H

#include "cuda/portable.cuh"

namespace vqk {
namespace nearest {

constexpr int tile_codes = 128;   // codes of one tile
constexpr int row_block = 64;     // rows of one packed block: what one wgmma multiplies
constexpr int padded_rows = 256;  // chunks are padded to this many rows
constexpr int capacity = 16;      // candidates that a row can list; more, and it is scanned in float64
constexpr int split_dims = 10;    // up to so many dims, operands are kept in two parts side by side
constexpr int bias_dims = 3, bias_exponent = 18;
constexpr int trailer_bytes = 1024;  // after the panels of a tile: 128 biases, then the bounds (reach, spread, offset)
constexpr int trailer_copied = 16 * (tile_codes / 4 + 1);  // of which so many bytes are read
constexpr int centre_codes = 1024;  // codes whose mean is the centre: any centre is right, a mean makes numbers small

enum Counter { head_counters = 2 };  // per head: wide rows; of all heads: rows to scan (at [heads])

// How operands lie in memory: panels of `width` dims (pitch 2 width bytes, swizzled), `panels` of them, the rest zeros.
struct Layout {
  int width, panels;
  bool split, folded;
};

struct Search {
  // What is searched.
  const void *x, *e;
  int64_t x_head, x_batch, x_row, x_dim, e_head, e_code, e_dim;
  int32_t x_dtype, e_dtype, metric;
  int64_t num_rows, inner;
  int32_t heads, num_codes, dim;
  int64_t *indices;
  float *score;
  // This chunk of rows.
  int64_t first_row;
  int32_t rows, rows_padded;
  // Packed operands.
  Layout layout;
  int32_t tiles, tile_bytes, splits, tiles_per_split, lists, span;
  float accumulation, keep;
  // Workspace.
  float *centre;          // (H, D)
  int32_t *head_state;    // (H, 2): bits of the largest |e - c|; 1 if every row must be scanned
  float *largest;         // (H, K): of each code, or a mark
  double *norms;          // (H, K): "cosine"
  unsigned char *codes;   // (H, tiles) of tile_bytes
  unsigned char *packed;  // (H, rows_padded / 64, panels) blocks of 64 rows
  float *info;            // (H, 5, rows_padded): f, |a|, |a - a^|, an offset, state
  float4 *part;           // (H, lists, rows_padded): lower, upper, second, group of 8 codes
  float *threshold;       // (H, rows_padded)
  int32_t *listed;        // (H, rows_padded, capacity)
  int32_t *count;         // (H, rows_padded)
  int32_t *wide;          // (H, rows_padded): rows whose candidates may be in several places
  int32_t *scan;          // (H * rows_padded): rows to compare with every code in float64
  int32_t *counters;      // (H + 1)
  int32_t *ticket;        // (H * rows_padded)
  double *slice_value;    // (scan items)
  int32_t *slice_code;
  int32_t slices, direct;
  // Levels of a residual search, or null: packing takes a code off each row and writes the difference to `residual`
  // (H, N, D), which is what later kernels read.
  const float *less_codes;  // (H, less_count, D)
  const int64_t *less_index;
  int64_t less_count;
  float *residual;
};

// What a row's `state` says.
constexpr float row_searched = 0.0f, row_scanned = 1.0f, row_hopeless = 2.0f;  // hopeless: a NaN, nothing can win
// Marks of a code that the screen leaves out, in place of its largest element.
constexpr float never_wins = -1.0f, needs_scan = -2.0f;

// Swizzle of rows of `pitch` bytes, in panels that start at a multiple of 1024: which 16 bytes of a row hold which 8 dims.
__host__ __device__ inline int swizzled(int row, int byte, int pitch) {
  const int at = row * pitch + byte;
  return at ^ ((at >> 7 & (pitch / 16 - 1)) << 4);
}

// Codes are spread so that each thread of a quad, which holds columns 8 j + 2 q + b of a product, has 32 neighbours.
__host__ __device__ inline int column_of_code(int code) { return (code % 32) / 2 * 8 + code / 32 * 2 + code % 2; }

#if defined(__CUDACC__) || defined(VQK_CUDA_HOST_EXECUTION_H)

VQK_DEVICE float load_float(const void *data, int dtype, int64_t index) {
  if (dtype == VQK_F32) return static_cast<const float *>(data)[index];
  const uint16_t bits = static_cast<const uint16_t *>(data)[index];
  return dtype == VQK_F16 ? half_to_float(bits) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

VQK_DEVICE int64_t row_start(const Search &s, int head, int64_t n) {
  return head * s.x_head + n / s.inner * s.x_batch + n % s.inner * s.x_row;
}

VQK_DEVICE int64_t code_start(const Search &s, int head, int64_t code) { return head * s.e_head + code * s.e_code; }

VQK_DEVICE bool finite(float value) { return fabsf(value) < INFINITY; }

// 2^exponent, exactly; exponents in [-126, 127].
VQK_DEVICE float power(int exponent) { return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23); }

VQK_DEVICE const unsigned char *tile_start(const Search &s, int head, int tile) {
  return s.codes + (static_cast<int64_t>(head) * s.tiles + tile) * s.tile_bytes;
}

VQK_DEVICE int64_t block_bytes(const Search &s) { return int64_t{2} * s.layout.width * row_block * s.layout.panels; }

// 16 bytes of a packed row: 8 dims of panel `panel`.
VQK_DEVICE const unsigned char *row_chunk(const Search &s, int head, int row, int panel, int chunk) {
  const int pitch = 2 * s.layout.width;
  return s.packed + (static_cast<int64_t>(head) * (s.rows_padded / row_block) + row / row_block) * block_bytes(s) +
         panel * (row_block * pitch) + swizzled(row % row_block, 16 * chunk, pitch);
}

// The bound of one row against any code of a tile: what the row brings, and what the tile does.
struct RowBound {
  float f, length, residual, offset;
};
VQK_DEVICE RowBound row_bound(const Search &s, int head, int row) {
  const float *at = s.info + static_cast<int64_t>(head) * 5 * s.rows_padded + row;
  return {at[0], at[s.rows_padded], at[2 * static_cast<int64_t>(s.rows_padded)], at[3 * static_cast<int64_t>(s.rows_padded)]};
}
// |computed t - t|, rounded up: no term is negative, and each came with four millionths more, twenty times what is lost here.
VQK_DEVICE float bound(const RowBound &r, const float *tile) {
  return __fmaf_rn(r.residual, tile[0], __fmaf_rn(r.length, tile[1], __fmaf_rn(r.f, tile[2], r.offset)));
}

#endif

}  // namespace nearest
}  // namespace vqk

#endif
