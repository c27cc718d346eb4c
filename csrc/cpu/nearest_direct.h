// A few rows against a codebook read once where it lies: nothing is packed, so nothing has to be fingerprinted either.
// Included by nearest_<isa>.cpp only, inside that file's flags; everything has internal linkage.
//
// Sums stay vectors until those of lanes codes can be added up together; what follows is per vector of codes, not per pair.
//
// Screen in float32: for "l2" the sum of squared differences itself, whose relative error is at most gamma because nothing
// cancels; for the others the dot product, off by at most gamma |x| |e|. Then candidates and the float64 decision as elsewhere.
#ifndef VQK_CPU_NEAREST_DIRECT_H
#define VQK_CPU_NEAREST_DIRECT_H

#include "cpu/nearest_finish.h"

namespace vqk {
namespace {

VQK_INLINE const float *direct_row(const Direct *search, int64_t row) {
  const int64_t inner = search->x->size[2];
  return static_cast<const float *>(search->x->data) + search->head_index * search->x->stride[0] +
         row / inner * search->x->stride[1] + row % inner * search->x->stride[2];
}

VQK_INLINE const float *direct_code(const Direct *search, int64_t k) {
  return static_cast<const float *>(search->codebook->data) + search->head_index * search->codebook->stride[0] +
         k * search->codebook->stride[1];
}

// Sums of lanes codes with up to 4 rows, one vector per pair into `sums`; without L2 also the codes' squares.
template <class P, int Rows, bool L2>
void direct_sums(const float *const *x, const float *const *e, int64_t dim, float (*sums)[P::lanes * P::lanes], float *squares) {
  // As many codes at a time as registers hold sums, next to the rows and two temporaries: a load of a row serves them all.
  constexpr int per_code = L2 ? Rows : Rows + 1, together = 4 * per_code + Rows + 2 <= P::registers ? 4 : 2;
  for (int first = 0; first < P::lanes; first += together) {
    typename P::V sum[together][Rows], square[together];
#pragma GCC unroll 4
    for (int c = 0; c < together; ++c) {
      square[c] = P::zero();
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[c][r] = P::zero();
    }
    const auto step = [&](const auto &load) {
      typename P::V row[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) row[r] = load(x[r]);
#pragma GCC unroll 4
      for (int c = 0; c < together; ++c) {
        const typename P::V code = load(e[first + c]);
        if (!L2) square[c] = P::multiply_add(code, code, square[c]);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const typename P::V difference = P::subtract(row[r], code);
          sum[c][r] = L2 ? P::multiply_add(difference, difference, sum[c][r]) : P::multiply_add(row[r], code, sum[c][r]);
        }
      }
    };
    int64_t d = 0;
    for (; d + P::lanes <= dim; d += P::lanes) step([d](const float *p) { return P::load(p + d); });
    if (d < dim) step([d, dim](const float *p) { return P::load_part(p + d, static_cast<int>(dim - d)); });
#pragma GCC unroll 4
    for (int c = 0; c < together; ++c) {
      if (!L2) P::store(squares + (first + c) * P::lanes, square[c]);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) P::store(sums[r] + (first + c) * P::lanes, sum[c][r]);
    }
  }
}

template <class P, bool L2>
void direct_screen_metric(const Direct *search, int64_t begin, int64_t end, float *lower) {
  typedef typename P::V V;
  constexpr int lanes = P::lanes;
  const int64_t dim = search->codebook->size[2], rows = search->rows;
  // Twice gamma_n; n counts the difference, the square and every addition.
  const float gamma = static_cast<float>(4.0 * (static_cast<double>(dim) + 16) * 0x1p-24);
  const V floor = P::set(0x1p-124f * static_cast<float>(dim + 1));  // squares of the code that underflow
  const float *x[kDirectRows];
  float length[kDirectRows];
  V best[kDirectRows];
  for (int64_t r = 0; r < rows; ++r) {
    x[r] = direct_row(search, r);
    double square = 0;
    if (!L2)
      for (int64_t d = 0; d < dim; ++d) square += static_cast<double>(x[r][d]) * static_cast<double>(x[r][d]);
    length[r] = static_cast<float>(std::sqrt(square)) * 1.0001f;
    best[r] = P::lowest();
  }
  alignas(64) float sums[4][lanes * lanes], squares[lanes * lanes];
  for (int64_t first = begin; first < end; first += lanes) {
    const float *e[lanes];
    for (int c = 0; c < lanes; ++c) e[c] = direct_code(search, first + c < end ? first + c : end - 1);  // the tail repeats a code
    for (int64_t group = 0; group < rows; group += 4) {
      const int count = rows - group < 4 ? static_cast<int>(rows - group) : 4;
      switch (count) {
        case 1: direct_sums<P, 1, L2>(x + group, e, dim, sums, squares); break;
        case 2: direct_sums<P, 2, L2>(x + group, e, dim, sums, squares); break;
        case 3: direct_sums<P, 3, L2>(x + group, e, dim, sums, squares); break;
        default: direct_sums<P, 4, L2>(x + group, e, dim, sums, squares); break;
      }
      V norm = P::zero();
      if (!L2 && search->metric == VQK_DOT) {
        norm = P::sqrt(P::add(P::totals(squares), floor));
      } else if (!L2) {
        float square[lanes];
        P::store(square, P::totals(squares));
        for (int c = 0; c < lanes; ++c) square[c] = square[c] > 0x1p-60f && square[c] < 0x1p120f ? square[c] : NAN;
        norm = P::sqrt(P::load(square));
      }
      for (int r = 0; r < count; ++r) {
        const V total = P::totals(sums[r]);
        const float reach = length[group + r];
        V value, bound;
        if (L2) {
          value = P::subtract(P::zero(), total);
          bound = P::add(P::multiply(P::set(gamma), total), P::set(0x1p-100f));  // squares may underflow
        } else if (search->metric == VQK_DOT) {
          value = total;
          bound = P::add(P::multiply(P::set(gamma * reach * 1.0001f), norm), P::set(0x1p-100f * (1.0f + reach)));
        } else {
          value = P::divide(total, norm);
          bound = P::set(2.0f * gamma * reach + 0x1p-60f);
        }
        // A sum that overflowed says nothing about the value: infinity times zero is NaN. A NaN in value or bound leaves the
        // code a candidate, and `max` takes its second argument then.
        bound = P::add(bound, P::multiply(total, P::zero()));
        P::store(search->upper + (group + r) * search->pitch + first, P::add(value, bound));
        best[group + r] = P::max(P::subtract(value, bound), best[group + r]);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    float least[lanes];
    P::store(least, best[r]);
    lower[r] = -INFINITY;
    for (float value : least) lower[r] = value > lower[r] ? value : lower[r];
  }
}

template <class P>
void direct_screen(const Direct *search, int64_t begin, int64_t end, float *lower) {
  if (search->metric == VQK_L2) return direct_screen_metric<P, true>(search, begin, end, lower);
  return direct_screen_metric<P, false>(search, begin, end, lower);
}

// The values to minimise of 8 codes for one row, in the order of the contract.
template <class P>
void direct_values(const Direct *search, const float *row, const int64_t *code, double *out) {
  const float *x[8], *e[8];
  const int64_t dim = search->codebook->size[2];
  for (int i = 0; i < 8; ++i) {
    x[i] = row;
    e[i] = direct_code(search, code[i]);
  }
  if (search->metric == VQK_L2) return P::template decide<true>(x, e, dim, out);
  P::template decide<false>(x, e, dim, out);
  double square[8];
  if (search->metric == VQK_COSINE) P::template decide<false>(e, e, dim, square);
  for (int i = 0; i < 8; ++i) {
    double value = out[i];
    if (search->metric == VQK_COSINE) value = similarity(value, std::sqrt(square[i]));
    out[i] = -value;
  }
}

template <class P>
void direct_finish(const Direct *search, int64_t r, float lower) {
  const int64_t codes = search->codebook->size[1];
  const float *row = direct_row(search, r), *upper = search->upper + r * search->pitch;
  double best = INFINITY;
  int64_t index = 0, code[8];
  double value[8];
  int waiting = 0;
  const auto settle = [&]() {
    for (int i = waiting; i < 8; ++i) code[i] = code[0];
    direct_values<P>(search, row, code, value);
    for (int i = 0; i < waiting; ++i) {  // ascending codes: the first of equal values stays
      if (value[i] < best) {
        best = value[i];
        index = code[i];
      }
    }
    waiting = 0;
  };
  const typename P::V below = P::set(std::nextafter(lower, -INFINITY));  // the largest value that is less
  for (int64_t first = 0; first < codes; first += P::lanes) {
    uint32_t candidates = ~P::at_least(below, P::load(upper + first)) & ((1u << P::lanes) - 1);  // a NaN is one
    for (; candidates != 0; candidates &= candidates - 1) {
      const int64_t k = first + __builtin_ctz(candidates);
      if (k >= codes) break;
      code[waiting++] = k;
      if (waiting == 8) settle();
    }
  }
  if (waiting > 0) settle();
  if (!(best < INFINITY)) {  // nothing can win: code 0 and its value
    for (int i = 0; i < 8; ++i) code[i] = 0;
    direct_values<P>(search, row, code, value);
    best = value[0];
    index = 0;
  }
  search->indices[r] = index;
  search->score[r] = static_cast<float>(search->metric == VQK_L2 ? best : -best);
}

}  // namespace
}  // namespace vqk

#endif
