// The screen on vector registers: lanes are rows, codes are broadcast, a register tile of P::code_tile codes by P::row_vectors
// vectors of rows. Maxima over codes are then plain vertical max operations, one per pair of vectors and code.
//
// Running maxima stay in memory between register tiles: kept in registers they push the operands onto the stack (gcc 12).
//
// A policy P names the vectors of one instruction set: V (float lanes), O (operands), A (accumulators; float lanes or integers),
// and the operations below. `start` and `score` are the ends of a sum: floats start at the bias and are the score, integers start
// at zero and become one by the factors of row and code.
#ifndef VQK_CPU_NEAREST_SIMD_H
#define VQK_CPU_NEAREST_SIMD_H

#include "cpu/nearest_finish.h"

namespace vqk {
namespace {

template <class P>
VQK_INLINE void screen_tile(const uint32_t *rows, int64_t row_pitch, const float *row_factors, const uint32_t *codes,
                            const float *bias, const float *factors, int64_t steps, float *const *best, bool first) {
  typename P::A sum[P::code_tile][P::row_vectors];
#pragma GCC unroll 8
  for (int c = 0; c < P::code_tile; ++c) {
    const typename P::A b = P::start(P::broadcast(bias + c));
#pragma GCC unroll 4
    for (int v = 0; v < P::row_vectors; ++v) sum[c][v] = b;
  }
#pragma GCC unroll 2
  for (int64_t s = 0; s < steps; ++s) {
    typename P::O x[P::row_vectors];
#pragma GCC unroll 4
    for (int v = 0; v < P::row_vectors; ++v) {
      x[v] = P::load_operand(rows + v * row_pitch + s * P::lanes);
      P::keep(&x[v]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < P::code_tile; ++c) {
      const typename P::O e = P::broadcast_operand(codes + s * kCodes + c);
#pragma GCC unroll 4
      for (int v = 0; v < P::row_vectors; ++v) sum[c][v] = P::multiply_add(x[v], e, sum[c][v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < P::row_vectors; ++v) {
    const typename P::V factor = P::load(row_factors + v * P::lanes);
    typename P::V most = P::score(sum[0][v], factor, P::broadcast(factors), P::broadcast(bias));
#pragma GCC unroll 8
    for (int c = 1; c < P::code_tile; ++c)
      most = P::max(most, P::score(sum[c][v], factor, P::broadcast(factors + c), P::broadcast(bias + c)));
    P::store(best[v], first ? most : P::max(most, P::load(best[v])));
  }
  __asm__ volatile("" ::: "memory");
}

// Codes are taken in chunks that stay in L2 while every row tile of the block passes over them.
template <class P>
void screen_simd(Block *block, int64_t begin, int64_t end) {
  const PackedHead *head = block->head;
  const int64_t steps = head->steps, per_group = head->blocks_per_group, bytes = steps * kCodes * 4;
  const int64_t groups_per_chunk = 1 + (128 << 10) / (bytes * per_group);
  const uint32_t *codes = head_codes(head);
  const float *bias = head_bias(head), *factors = head_factors(head);
  for (int64_t chunk = begin; chunk < end; chunk += groups_per_chunk * per_group) {
    const int64_t stop = chunk + groups_per_chunk * per_group < end ? chunk + groups_per_chunk * per_group : end;
    for (int64_t tile = 0; tile < block->padded_rows; tile += P::lanes * P::row_vectors) {
      const uint32_t *rows = block->packed_rows + tile * steps;
      for (int64_t first = chunk; first < stop; first += per_group) {
        float *best[P::row_vectors];
        for (int v = 0; v < P::row_vectors; ++v) best[v] = strip_at(block, P::lanes, tile + v * P::lanes, first / per_group);
        for (int64_t b = first; b < first + per_group; ++b)
          for (int c = 0; c < kCodes; c += P::code_tile)
            screen_tile<P>(rows, steps * P::lanes, block->row_factor + tile, codes + b * steps * kCodes + c,
                           bias + b * kCodes + c, factors + b * kCodes + c, steps, best, b == first && c == 0);
      }
    }
  }
}

// Screened scores of one row against a block of 16 codes (lanes are codes here): bit i is set if code i reaches the threshold.
template <class P>
VQK_INLINE uint32_t refine_block(const uint32_t *row, int64_t stride, const float *row_factor, const uint32_t *codes,
                                 const float *bias, const float *factors, int64_t steps, float limit) {
  constexpr int vectors = kCodes / P::lanes, chains = 4;  // several chains hide the latency of the multiply-add
  typename P::A sum[chains][vectors];
  for (int v = 0; v < vectors; ++v) {
    sum[0][v] = P::start(P::load(bias + v * P::lanes));
    for (int j = 1; j < chains; ++j) sum[j][v] = P::start(P::zero());
  }
  int64_t s = 0;
  for (; s + chains <= steps; s += chains) {
#pragma GCC unroll 4
    for (int j = 0; j < chains; ++j) {
      const typename P::O x = P::broadcast_operand(row + (s + j) * stride);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sum[j][v] = P::multiply_add(x, P::load_operand(codes + (s + j) * kCodes + v * P::lanes), sum[j][v]);
    }
  }
  for (; s < steps; ++s) {
    const typename P::O x = P::broadcast_operand(row + s * stride);
    for (int v = 0; v < vectors; ++v)
      sum[0][v] = P::multiply_add(x, P::load_operand(codes + s * kCodes + v * P::lanes), sum[0][v]);
  }
  uint32_t mask = 0;
  for (int v = 0; v < vectors; ++v) {
    const typename P::A total = P::add(P::add(sum[0][v], sum[1][v]), P::add(sum[2][v], sum[3][v]));
    const typename P::V score =
        P::score(total, P::broadcast(row_factor), P::load(factors + v * P::lanes), P::load(bias + v * P::lanes));
    mask |= P::at_least(score, P::set(limit)) << (v * P::lanes);
  }
  return mask;
}

// max over groups of (score - bound), per lane. The bound without the row's own offset.
template <class P>
VQK_INLINE void lower_bound_simd(const float *strip, const GroupBound *bounds, int64_t groups, const float *length,
                                 const float *residual, float *out) {
  const typename P::V l = P::load(length), r = P::load(residual);
  typename P::V best = P::lowest();
  for (int64_t g = 0; g < groups; ++g) {
    const typename P::V bound = P::add(P::multiply(r, P::broadcast(&bounds[g].reach)),
                                       P::add(P::multiply(l, P::broadcast(&bounds[g].spread)), P::broadcast(&bounds[g].offset)));
    best = P::max(best, P::subtract(P::load(strip + g * P::lanes), bound));
  }
  P::store(out, best);
}

template <class P>
VQK_INLINE void largest_simd(const float *strip, int64_t groups, float *out) {
  typename P::V best = P::lowest();
  for (int64_t g = 0; g < groups; ++g) best = P::max(best, P::load(strip + g * P::lanes));
  P::store(out, best);
}

// Calls refine(group, rows as a bit mask, bounds per row) for every group whose upper bound reaches a row's threshold.
template <class P, class Refine>
VQK_INLINE void for_each_candidate_group(const Block *block, int64_t tile, const float *threshold, const Refine &refine) {
  const GroupBound *bounds = head_bounds(block->head);
  const typename P::V l = P::load(block->row_length + tile), r = P::load(block->row_residual + tile);
  const typename P::V limit = P::load(threshold);
  const bool exact = block->precision == VQK_EXACT;
  const float *strip = strip_at(block, P::lanes, tile, 0);
  for (int64_t g = 0; g < block->head->groups; ++g) {
    typename P::V bound = P::zero();
    if (exact)
      bound = P::add(P::multiply(r, P::broadcast(&bounds[g].reach)),
                     P::add(P::multiply(l, P::broadcast(&bounds[g].spread)), P::broadcast(&bounds[g].offset)));
    const uint32_t rows = P::at_least(P::add(P::load(strip + g * P::lanes), bound), limit);
    if (__builtin_expect(rows != 0, 0)) refine(g, rows, P::subtract(limit, bound));
  }
}

template <class P, class Emit>
VQK_INLINE void candidates_simd(Block *block, int64_t tile, const float *threshold, const Emit &emit) {
  const PackedHead *head = block->head;
  const int64_t steps = head->steps;
  const uint32_t *packed = block->packed_rows + tile * steps;
  for_each_candidate_group<P>(block, tile, threshold, [&](int64_t group, uint32_t rows, typename P::V limits) {
    float limit[P::lanes];
    P::store(limit, limits);
    for (; rows != 0; rows &= rows - 1) {
      const int lane = __builtin_ctz(rows);
      // Another order of summation than the screen's, so a relative hair more room; never less than the bound allows.
      const float reach = limit[lane] - 0x1p-20f * std::fabs(limit[lane]);
      for (int64_t b = group * head->blocks_per_group; b < (group + 1) * head->blocks_per_group; ++b) {
        uint32_t codes =
            refine_block<P>(packed + lane, P::lanes, block->row_factor + tile + lane, head_codes(head) + b * steps * kCodes,
                            head_bias(head) + b * kCodes, head_factors(head) + b * kCodes, steps, reach);
        for (; codes != 0; codes &= codes - 1) emit(tile + lane, b * kCodes + __builtin_ctz(codes));
      }
    }
  });
}

}  // namespace
}  // namespace vqk

// Sums of floats: they start at the bias, and are the score.
#define VQK_SIMD_FLOAT_SUMS(V)                \
  typedef V A;                                \
  static constexpr bool exact_sums = false;   \
  VQK_INLINE V start(V bias) { return bias; } \
  VQK_INLINE V score(V sum, V, V, V) { return sum; }

// One instruction set's table of kernels from its policy.
#define VQK_SIMD_POLICY_MEMBERS(P)                                                                                             \
  static void lower_bound(const float *strip, const GroupBound *bounds, int64_t groups, const float *length, const float *res, \
                          float *out) {                                                                                        \
    lower_bound_simd<P>(strip, bounds, groups, length, res, out);                                                              \
  }                                                                                                                            \
  static void largest(const float *strip, int64_t groups, float *out) { largest_simd<P>(strip, groups, out); }

#endif
