// Between nearest.cpp (arguments, threads, packing plan) and the kernels of one instruction set each.
//
// The search works in "screen units": rows x' = scale * (x - centre), codes e' = scale * (e - centre), and the score to
// maximise is t_k = x'.e'_k - |e'_k|^2 / 2 ("l2"), or x.e'_k ("dot", "cosine": e' = scale * e, or e / |e|; no centre).
// Screening computes t with rounded operands; `GroupBound` and `Block::row_*` carry what the error bound needs.
#ifndef VQK_CPU_NEAREST_H
#define VQK_CPU_NEAREST_H

#include "common.h"

namespace vqk {

constexpr int kCodes = 16;           // codes per block, the unit of packing
constexpr int64_t kMaxGroups = 512;  // groups per head: bounds the screen's strip to 2 KB per row

// Up to this many dims, bf16 operands are kept in two parts, x = x1 + x2 and e = e1 + e2, side by side along the contraction:
// [x1 x2 x1 1 1 1] . [e1 e1 e2 b1 b2 b3], with the bias b of the code in three parts. A tile product takes 32 dims whether they
// are used or not, so the extra precision is free there.
constexpr int64_t kSplitDims = 9;

// AVX2 screens in int16 between these numbers of dims. Below, the sums are too short to pay for turning them into scores; above,
// the half unit that each dim loses adds up to more than what float32 sums lose. Either screen is correct at any size.
constexpr int64_t kInt16LeastDims = 20, kInt16MostDims = 8192;

// |computed t - t| <= row_residual * reach + row_length * spread + offset + row_offset, for every code of a group.
struct GroupBound {
  float reach;   // max |e'|
  float spread;  // max (|e' - rounded e'| + A |rounded e'|)
  float offset;  // max of what depends on the code alone
  float unused;
};

// Start of one head's packed codebook; offsets are in bytes from here.
struct PackedHead {
  int64_t bytes;
  int64_t num_codes, dim;
  int64_t steps;             // 4-byte elements per row: dims (float32) or pairs of dims (bf16, int16), padded
  int64_t blocks;            // blocks of 16 codes, padded
  int64_t blocks_per_group;  // a power of two
  int64_t groups;
  int64_t centre, bias, factors, bounds, norms, codes;
  double scale;      // of the codes; a power of two
  double row_scale;  // of the rows: the same for l2, 1 otherwise
  float reach;       // max |e'| over the head
  int32_t scan;      // 1: no usable bound, decide every pair in float64
  int32_t ordered;   // 1: codes are packed in the order of head_order()
  int32_t pad;
};

VQK_INLINE float *head_floats(const PackedHead *head, int64_t offset) {
  return reinterpret_cast<float *>(const_cast<char *>(reinterpret_cast<const char *>(head)) + offset);
}
VQK_INLINE float *head_centre(const PackedHead *head) { return head_floats(head, head->centre); }    // steps * dims, zero padded
VQK_INLINE float *head_bias(const PackedHead *head) { return head_floats(head, head->bias); }        // -|e'|^2/2; -inf: no code
VQK_INLINE float *head_factors(const PackedHead *head) { return head_floats(head, head->factors); }  // value = element * factor
VQK_INLINE GroupBound *head_bounds(const PackedHead *head) {
  return reinterpret_cast<GroupBound *>(head_floats(head, head->bounds));
}
VQK_INLINE double *head_norms(const PackedHead *head) { return reinterpret_cast<double *>(head_floats(head, head->norms)); }
// In the place of the norms, which only "cosine" needs.
VQK_INLINE int64_t *head_order(const PackedHead *head) { return reinterpret_cast<int64_t *>(head_floats(head, head->norms)); }
// The code that is packed at `place`.
VQK_INLINE int64_t code_at(const PackedHead *head, int64_t place) { return head->ordered ? head_order(head)[place] : place; }
VQK_INLINE uint32_t *head_codes(const PackedHead *head) { return reinterpret_cast<uint32_t *>(head_floats(head, head->codes)); }

// Rows that are searched together, and the scratch they need.
struct Block {
  const vqk_rows *x;
  const vqk_codes *codebook;
  const PackedHead *head;
  int64_t head_index, first, rows;  // rows [first, first + rows) of the head's B * S
  int64_t padded_rows;              // a multiple of Kernels::row_tile
  int32_t metric, precision;
  int64_t *indices;  // of `first`
  float *score;

  uint32_t *packed_rows;  // [row tile][steps][lanes]
  float *strip;           // [row tile][groups | 1][lanes]: best screened score of each group
  float *row_length, *row_residual, *row_offset, *row_factor;
  uint8_t *row_scan;  // 1: no bound, decide against every code
  void *row_copy;     // rows in row-major order, float or double, when x is not readable in place
  float *convert;     // one row in screen units, one row of packed elements per lane
  float *zeros;       // a centre of zeros
  double *best_value;
  int64_t *best_index;
  void *code_copy;  // 8 converted codes
};

// A few float32 rows of one head against its float32 codes, read where they lie.
constexpr int64_t kDirectRows = 8;
struct Direct {
  const vqk_rows *x;
  const vqk_codes *codebook;
  int64_t head_index, rows;
  int32_t metric;
  int64_t pitch;  // codes, padded to a multiple of kCodes
  float *upper;   // [rows][pitch]: nothing better than this is possible
  int64_t *indices;
  float *score;
};

// nearest_units.cpp: the centre and the scale of one head, and the order of its codes.
int32_t choose_units(const vqk_codes *codebook, int64_t head_index, int32_t metric, PackedHead *head);
int32_t order_codes(const vqk_codes *codebook, int64_t head_index, int32_t metric, PackedHead *head);

struct Kernels {
  int dims_per_step, step_multiple, lanes, row_tile, block_rows;
  // Blocks [begin, end) of 16 codes of one head into `head`: values, bias, norms; bounds per block in `block_bounds`, and a
  // number per code in `keys` that is the same for equal codes.
  // Returns 1 if a code defeats the bound (its head must be scanned).
  int32_t (*pack)(const vqk_codes *codebook, int64_t head_index, int32_t metric, PackedHead *head, int64_t begin, int64_t end,
                  GroupBound *block_bounds, uint64_t *keys);
  void (*exclude)(PackedHead *head, int64_t code);  // the screen never takes this code again
  void (*prepare)(Block *block);
  void (*screen)(Block *block, int64_t begin, int64_t end);  // blocks of 16 codes, whole groups
  void (*finish)(Block *block);
  // nullptr: the instruction set leaves few rows to AVX-512.
  // Codes [begin, end), begin a multiple of kCodes.
  void (*direct_screen)(const Direct *search, int64_t begin, int64_t end, float *lower /* [rows] */);
  void (*direct_finish)(const Direct *search, int64_t row, float lower);
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx2_int16;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_amx;
extern const Kernels kernels_neon;

}  // namespace vqk

#endif
