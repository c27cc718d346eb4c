// From screened group maxima to indices: which groups can hold the winner, which of their codes, and the float64 decision.
// Included by nearest_<isa>.cpp only, inside that file's flags; everything has internal linkage.
#ifndef VQK_CPU_NEAREST_FINISH_H
#define VQK_CPU_NEAREST_FINISH_H

#include "cpu/nearest_pack.h"

namespace vqk {
namespace {

// The value to minimise for 8 pairs (row, code), summed over d in ascending order in every lane: one order for all backends.
// P may provide a vector form; this is the plain one.
template <bool L2, class X, class E>
VQK_INLINE void decide_plain(const X *const *x, const E *const *e, int64_t dim, double *out) {
  double total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t d = 0; d < dim; ++d) {
    for (int i = 0; i < 8; ++i) {
      const double a = static_cast<double>(x[i][d]), b = static_cast<double>(e[i][d]);
      if (L2) {
        const double difference = a - b;
        total[i] += difference * difference;
      } else {
        total[i] += a * b;
      }
    }
  }
  for (int i = 0; i < 8; ++i) out[i] = total[i];
}

// Pairs waiting for their float64 value. Fixed size: a full list is decided and starts again, however many candidates there are.
struct Pairs {
  static constexpr int capacity = 512;
  int count = 0;
  int32_t row[capacity];
  int64_t code[capacity];
};

// x.e / |e|; 0 for a code of zeros, and a NaN stays one.
VQK_INLINE double similarity(double product, double norm) {
  if (norm > 0) return product / norm;
  return product != product ? product : 0.0 * product;
}

template <class P, class X, class E>
void decide_typed(Block *block, const Pairs &pairs, double *out) {
  const int64_t dim = block->head->dim;
  for (int i = 0; i < pairs.count; i += 8) {
    const X *x[8];
    const E *e[8];
    for (int j = 0; j < 8; ++j) {
      const int at = i + j < pairs.count ? i + j : i;  // the tail repeats a pair
      x[j] = sizeof(X) == 4 ? reinterpret_cast<const X *>(float_row(block, pairs.row[at]))
                            : reinterpret_cast<const X *>(double_row(block, pairs.row[at]));
      e[j] = static_cast<const E *>(
          code_row(block->codebook, block->head_index, pairs.code[at], static_cast<float *>(block->code_copy) + j * dim));
    }
    double total[8];
    if (block->metric == VQK_L2)
      P::template decide<true>(x, e, dim, total);
    else
      P::template decide<false>(x, e, dim, total);
    for (int j = 0; j < 8 && i + j < pairs.count; ++j) {
      double value = total[j];
      if (block->metric == VQK_COSINE) value = similarity(value, head_norms(block->head)[pairs.code[i + j]]);
      out[i + j] = block->metric == VQK_L2 ? value : -value;
    }
  }
}

template <class P>
void decide_values(Block *block, const Pairs &pairs, double *out) {
  const bool wide_x = block->x->dtype == VQK_F64, wide_e = block->codebook->dtype == VQK_F64;
  if (!wide_x && !wide_e)
    decide_typed<P, float, float>(block, pairs, out);
  else if (!wide_x)
    decide_typed<P, float, double>(block, pairs, out);
  else if (!wide_e)
    decide_typed<P, double, float>(block, pairs, out);
  else
    decide_typed<P, double, double>(block, pairs, out);
}

template <class P>
void flush(Block *block, Pairs *pairs) {
  double value[Pairs::capacity];
  decide_values<P>(block, *pairs, value);
  for (int i = 0; i < pairs->count; ++i) {
    const int32_t row = pairs->row[i];
    const int64_t code = pairs->code[i];
    // NaN compares false; an infinite value never beats the initial one: index 0 stays.
    if (value[i] < block->best_value[row] || (value[i] == block->best_value[row] && code < block->best_index[row])) {
      block->best_value[row] = value[i];
      block->best_index[row] = code;
    }
  }
  pairs->count = 0;
}

template <class P>
VQK_INLINE void push(Block *block, Pairs *pairs, int64_t row, int64_t code) {
  pairs->row[pairs->count] = static_cast<int32_t>(row);
  pairs->code[pairs->count] = code;
  if (++pairs->count == Pairs::capacity) flush<P>(block, pairs);
}

VQK_INLINE float *strip_at(const Block *block, int lanes, int64_t tile, int64_t group) {
  return block->strip + ((tile / lanes) * (block->head->groups | 1) + group) * lanes;
}

// `P::candidates(block, tile, threshold, emit)` refines the groups that can hold the winner of a tile of rows and calls
// emit(row, place) for each packed code whose screened score reaches the threshold.
template <class P>
void finish_block(Block *block) {
  const PackedHead *head = block->head;
  const GroupBound *bounds = head_bounds(head);
  Pairs pairs;
  for (int64_t r = 0; r < block->rows; ++r) {
    block->best_value[r] = INFINITY;
    block->best_index[r] = 0;
  }
  for (int64_t tile = 0; tile < block->rows; tile += P::lanes) {
    float threshold[P::lanes];
    const float *length = block->row_length + tile, *residual = block->row_residual + tile;
    if (block->precision == VQK_EXACT) {
      P::lower_bound(strip_at(block, P::lanes, tile, 0), bounds, head->groups, length, residual, threshold);
    } else {  // no certificate: only what ties with the best screened score within the rounding of its sums
      P::largest(strip_at(block, P::lanes, tile, 0), head->groups, threshold);
      for (int r = 0; r < P::lanes; ++r) threshold[r] -= dot_error(head->dim) * head->reach * (length[r] + head->reach);
    }
    for (int r = 0; r < P::lanes; ++r) {
      const bool searched = tile + r < block->rows && !block->row_scan[tile + r] && !head->scan;
      if (!searched)
        threshold[r] = INFINITY;  // nothing reaches it
      else if (block->precision == VQK_EXACT)
        threshold[r] -= 2 * block->row_offset[tile + r] + 0x1p-19f * std::fabs(threshold[r]);
    }
    P::candidates(block, tile, threshold, [&](int64_t row, int64_t place) {
      if (place < head->num_codes) push<P>(block, &pairs, row, code_at(head, place));
    });
    for (int r = 0; r < P::lanes && tile + r < block->rows; ++r)
      if (block->row_scan[tile + r] || head->scan)
        for (int64_t k = 0; k < head->num_codes; ++k) push<P>(block, &pairs, tile + r, k);
  }
  flush<P>(block, &pairs);

  // Rows where nothing can win report code 0 and its value.
  Pairs one;
  for (int64_t r = 0; r < block->rows; ++r) {
    if (!(block->best_value[r] < INFINITY)) {
      one.count = 1;
      one.row[0] = static_cast<int32_t>(r);
      one.code[0] = 0;
      decide_values<P>(block, one, &block->best_value[r]);
      block->best_index[r] = 0;
    }
    block->indices[r] = block->best_index[r];
    block->score[r] = static_cast<float>(block->metric == VQK_L2 ? block->best_value[r] : -block->best_value[r]);
  }
}

}  // namespace
}  // namespace vqk

#endif
