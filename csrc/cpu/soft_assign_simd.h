// The kernels of soft_assign on vector registers. A policy P names the vectors of one instruction set: V, `lanes` floats; tiles
// of `tile` rows (or dims) by `vectors` vectors, which fit its registers.
#ifndef VQK_CPU_SOFT_ASSIGN_SIMD_H
#define VQK_CPU_SOFT_ASSIGN_SIMD_H

#include <cmath>

#include "cpu/soft_assign.h"

namespace vqk {
namespace {

// Terms that one float32 sum takes before it goes on as part of another: its error grows with their number.
constexpr int64_t kTerms = 128, kVectorTerms = 64;

// e^x for x <= 0: with x = n log 2 + r, e^r is 1 + r + r^2 q(r), where q is the polynomial of degree 4 that makes the largest
// relative error on |r| <= log(2) / 2 least (Remez; 3.6e-9 with coefficients in float32). With rounding 0.7 2^-23 at most
// (tests/ops/test_soft_assign.py). 0 below kExpLeast, where e^x would soon be subnormal; NaN stays NaN.
constexpr float kExpLeast = -86.6f;

template <class P>
VQK_INLINE typename P::V exponential(typename P::V x) {
  typedef typename P::V V;
  const V round = P::set(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  const V shifted = P::multiply_add(x, P::set(1.44269504f), round), n = P::subtract(shifted, round);
  V r = P::multiply_add(n, P::set(-0.693359375f), x);  // exact: nine bits
  r = P::multiply_add(n, P::set(2.12194440e-4f), r);
  V q = P::set(0x1.6a23dp-10f);
  q = P::multiply_add(q, r, P::set(0x1.123a2p-7f));
  q = P::multiply_add(q, r, P::set(0x1.5558f2p-5f));
  q = P::multiply_add(q, r, P::set(0x1.555492p-3f));
  q = P::multiply_add(q, r, P::set(0x1.fffffcp-2f));
  const V e = P::add(P::multiply_add(q, P::multiply(r, r), r), P::set(1.0f));
  return P::scaled(e, n, shifted, x);
}

// Calls f with the integral constant of `count`, at most `most`.
template <int most, class F>
VQK_INLINE void with_count(int64_t count, const F &f) {
  if constexpr (most > 1)
    if (count < most) return with_count<most - 1>(count, f);
  f(std::integral_constant<int, most>{});
}

// sum[j][c] = sum over i < count of b[j b_row + i b_step] a[i a_step + vector c], in ascending i.
template <class P, int J, int C>
VQK_INLINE void products(const float *a, int64_t a_step, const float *b, int64_t b_row, int64_t b_step, int64_t count,
                         typename P::V (&sum)[J][C]) {
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[j][c] = P::zero();
  for (int64_t i = 0; i < count; ++i) {
    typename P::V value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = P::load(a + i * a_step + c * P::lanes);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const typename P::V factor = P::broadcast(b + j * b_row + i * b_step);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[j][c] = P::multiply_add(factor, value[c], sum[j][c]);
    }
  }
}

template <class P>
double lane_sum(typename P::V v) {
  float lane[P::lanes];
  double total = 0;
  P::store(lane, v);
  for (float value : lane) total += static_cast<double>(value);
  return total;
}

template <class P>
float largest_score(const float *score, int64_t codes) {
  typename P::V best = P::set(-INFINITY);
  for (int64_t k = 0; k < codes; k += P::lanes) best = P::max(best, P::load(score + k));
  float lane[P::lanes], found = -INFINITY;
  P::store(lane, best);
  for (float value : lane) found = value > found ? value : found;
  return found;
}

template <class P>
void soft_scores(const float *x, int64_t x_pitch, int64_t rows, int64_t dim, const float *codes, const float *offset, float scale,
                 float factor, float *out, int64_t pitch) {
  constexpr int C = P::vectors, width = C * P::lanes;
  for (int64_t first = 0; first < dim; first += kTerms) {
    const int64_t terms = std::min(kTerms, dim - first);
    const bool last = first + terms == dim;
    for (int64_t r = 0; r < rows; r += P::tile)
      with_count<P::tile>(rows - r, [&](auto count) {
        constexpr int J = decltype(count)::value;
        typename P::V sum[J][C];
        products<P, J, C>(codes + first * width, width, x + r * x_pitch + first, x_pitch, 1, terms, sum);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) {
            float *to = out + (r + j) * pitch + c * P::lanes;
            typename P::V value = first > 0 ? P::add(P::load(to), sum[j][c]) : sum[j][c];
            if (last)
              value = P::multiply(P::subtract(P::multiply(P::set(scale), value), P::load(offset + c * P::lanes)), P::set(factor));
            P::store(to, value);
          }
      });
  }
}

template <class P>
void soft_exponentials(float *score, int64_t codes, double *sum, double *moment) {
  typedef typename P::V V;
  const V top = P::set(largest_score<P>(score, codes)), least = P::set(2 * kExpLeast);
  for (int64_t first = 0; first < codes; first += kVectorTerms * P::lanes) {
    V z = P::zero(), m = P::zero();
    for (int64_t k = first; k < std::min(codes, first + kVectorTerms * P::lanes); k += P::lanes) {
      // Not below what gives 0: 0 times infinity would be NaN.
      const V d = P::max(least, P::subtract(P::load(score + k), top)), e = exponential<P>(d);
      P::store(score + k, e);
      z = P::add(z, e);
      m = P::multiply_add(e, d, m);
    }
    *sum += lane_sum<P>(z);
    *moment += lane_sum<P>(m);
  }
}

template <class P>
void soft_gradient(float *score, float *soft, const float *usage, float entropy, float weight, int64_t codes) {
  typedef typename P::V V;
  const V top = P::set(largest_score<P>(score, codes)), least = P::set(2 * kExpLeast), minus = P::set(-entropy);
  double sum = 0, inner = 0;
  for (int64_t first = 0; first < codes; first += kVectorTerms * P::lanes) {
    V z = P::zero(), m = P::zero();
    for (int64_t k = first; k < std::min(codes, first + kVectorTerms * P::lanes); k += P::lanes) {
      const V d = P::max(least, P::subtract(P::load(score + k), top)), e = exponential<P>(d);
      // log p is d less the same number for all codes, which changes nothing.
      const V a = P::multiply_add(minus, d, P::add(P::load(soft + k), P::load(usage + k)));
      P::store(score + k, e);
      P::store(soft + k, a);
      z = P::add(z, e);
      m = P::multiply_add(e, a, m);
    }
    sum += lane_sum<P>(z);
    inner += lane_sum<P>(m);
  }
  const V mean = P::set(static_cast<float>(inner / sum)), scale = P::set(static_cast<float>(static_cast<double>(weight) / sum));
  for (int64_t k = 0; k < codes; k += P::lanes)
    P::store(score + k, P::multiply(P::multiply(P::load(score + k), scale), P::subtract(P::load(soft + k), mean)));
}

template <class P>
void soft_columns(const float *values, int64_t pitch, int64_t rows, const float *factors, double *total) {
  constexpr int C = P::vectors;
  for (int64_t first = 0; first < rows; first += kTerms) {
    typename P::V sum[1][C];
    products<P, 1, C>(values + first * pitch, pitch, factors + first, 0, 1, std::min(kTerms, rows - first), sum);
    float part[C * P::lanes];
    for (int c = 0; c < C; ++c) P::store(part + c * P::lanes, sum[0][c]);
    for (int k = 0; k < C * P::lanes; ++k) total[k] += static_cast<double>(part[k]);
  }
}

template <class P>
void soft_row_sums(const float *values, int64_t pitch, int64_t rows, const float *codes, int64_t code_pitch, int64_t num_codes,
                   int64_t vectors, float *out, int64_t out_pitch) {
  for (int64_t first = 0; first < num_codes; first += kTerms)
    for (int64_t r = 0; r < rows; r += P::tile)
      with_count<P::tile>(rows - r, [&](auto count) {
        with_count<P::vectors>(vectors, [&](auto columns) {
          constexpr int J = decltype(count)::value, C = decltype(columns)::value;
          typename P::V sum[J][C];
          products<P, J, C>(codes + first * code_pitch, code_pitch, values + r * pitch + first, pitch, 1,
                            std::min(kTerms, num_codes - first), sum);
#pragma GCC unroll 8
          for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
              float *to = out + (r + j) * out_pitch + c * P::lanes;
              P::store(to, P::add(P::load(to), sum[j][c]));
            }
        });
      });
}

template <class P>
void soft_code_sums(const float *values, int64_t pitch, int64_t rows, const float *x, int64_t x_pitch, int64_t begin, int64_t end,
                    float *out) {
  constexpr int C = P::vectors, width = C * P::lanes;
  for (int64_t first = 0; first < rows; first += kTerms)
    for (int64_t d = begin; d < end; d += P::tile)
      with_count<P::tile>(end - d, [&](auto count) {
        constexpr int J = decltype(count)::value;
        typename P::V sum[J][C];
        products<P, J, C>(values + first * pitch, pitch, x + first * x_pitch + d, 1, x_pitch, std::min(kTerms, rows - first),
                          sum);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) {
            float *to = out + (d + j) * width + c * P::lanes;
            P::store(to, P::add(P::load(to), sum[j][c]));
          }
      });
}

template <class P>
constexpr SoftKernels soft_kernels() {
  return {P::lanes,         P::vectors * P::lanes, P::tile,          soft_scores<P>,   soft_exponentials<P>,
          soft_gradient<P>, soft_columns<P>,       soft_row_sums<P>, soft_code_sums<P>};
}

}  // namespace
}  // namespace vqk

#endif
