// A few rows against a codebook read once where it lies: nothing is packed, so nothing has to be fingerprinted either.
// Included by nearest_<isa>.cpp only, inside that file's flags; everything has internal linkage.
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

template <class P, int Rows, bool L2>
void direct_screen_rows(const Direct *search, int64_t begin, int64_t end, float *lower) {
  const int64_t dim = search->codebook->size[2], codes = search->codebook->size[1];
  // Twice gamma_n; n counts the difference, the square and every addition.
  const float gamma = static_cast<float>(4.0 * (static_cast<double>(dim) + 16) * 0x1p-24);
  const float floor = 0x1p-124f * static_cast<float>(dim + 1);  // squares of the code that underflow
  const float *x[Rows];
  float length[Rows];
  for (int r = 0; r < Rows; ++r) {
    x[r] = direct_row(search, r);
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) square += static_cast<double>(x[r][d]) * static_cast<double>(x[r][d]);
    length[r] = static_cast<float>(std::sqrt(square)) * 1.0001f;
    lower[r] = -INFINITY;
  }
  // Several codes at a time where there are few rows: the sums of a single one would wait for each other.
  constexpr int together = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  for (int64_t first = begin; first < end; first += together) {
    const int count = end - first < together ? static_cast<int>(end - first) : together;
    const float *e[together];
    for (int c = 0; c < together; ++c) e[c] = direct_code(search, c < count ? first + c : first);  // the tail repeats a code
    typename P::V sum[together][Rows], square[together];
    for (int c = 0; c < together; ++c) {
      square[c] = P::zero();
      for (int r = 0; r < Rows; ++r) sum[c][r] = P::zero();
    }
    int64_t d = 0;
    for (; d + P::lanes <= dim; d += P::lanes) {
      typename P::V row[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) row[r] = P::load(x[r] + d);
#pragma GCC unroll 4
      for (int c = 0; c < together; ++c) {
        const typename P::V code = P::load(e[c] + d);
        if (!L2) square[c] = P::multiply_add(code, code, square[c]);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const typename P::V difference = P::subtract(row[r], code);
          sum[c][r] = L2 ? P::multiply_add(difference, difference, sum[c][r]) : P::multiply_add(row[r], code, sum[c][r]);
        }
      }
    }
    for (int c = 0; c < count; ++c) {
      const int64_t k = first + c;
      float total[Rows], norm = P::sum(square[c]);
      for (int r = 0; r < Rows; ++r) total[r] = P::sum(sum[c][r]);
      for (int64_t i = d; i < dim; ++i) {
        if (!L2) norm += e[c][i] * e[c][i];
        for (int r = 0; r < Rows; ++r) total[r] += L2 ? (x[r][i] - e[c][i]) * (x[r][i] - e[c][i]) : x[r][i] * e[c][i];
      }
      for (int r = 0; r < Rows; ++r) {
        float value, bound;
        if (L2) {
          value = -total[r];
          bound = gamma * total[r] + 0x1p-100f;  // squares may underflow
        } else if (search->metric == VQK_DOT) {
          value = total[r];
          bound = gamma * length[r] * std::sqrt(norm + floor) * 1.0001f + 0x1p-100f * (1.0f + length[r]);
        } else if (norm > 0x1p-60f && norm < 0x1p120f) {
          value = total[r] / std::sqrt(norm);
          bound = 2.0f * gamma * length[r] + 0x1p-60f;
        } else {
          value = 0.0f;
          bound = INFINITY;
        }
        // A sum that overflowed says nothing about the value.
        if (!(std::fabs(total[r]) < INFINITY)) bound = INFINITY;
        // A NaN in value or bound leaves the code a candidate: the decision knows.
        search->upper[r * codes + k] = value + bound;
        lower[r] = value - bound > lower[r] ? value - bound : lower[r];
      }
    }
  }
}

template <class P>
void direct_screen(const Direct *search, int64_t begin, int64_t end, float *lower) {
  const bool l2 = search->metric == VQK_L2;
  switch (search->rows) {
    case 1:
      return l2 ? direct_screen_rows<P, 1, true>(search, begin, end, lower)
                : direct_screen_rows<P, 1, false>(search, begin, end, lower);
    case 2:
      return l2 ? direct_screen_rows<P, 2, true>(search, begin, end, lower)
                : direct_screen_rows<P, 2, false>(search, begin, end, lower);
    case 3:
      return l2 ? direct_screen_rows<P, 3, true>(search, begin, end, lower)
                : direct_screen_rows<P, 3, false>(search, begin, end, lower);
    default:
      return l2 ? direct_screen_rows<P, 4, true>(search, begin, end, lower)
                : direct_screen_rows<P, 4, false>(search, begin, end, lower);
  }
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
  const float *row = direct_row(search, r), *upper = search->upper + r * codes;
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
  for (int64_t k = 0; k < codes; ++k) {
    if (upper[k] < lower) continue;
    code[waiting++] = k;
    if (waiting == 8) settle();
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
