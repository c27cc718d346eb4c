// What the three AVX-512 builds share: 16 lanes, transposes, and the float64 decision on 8 pairs at a time.
#ifndef VQK_CPU_NEAREST_AVX512_H
#define VQK_CPU_NEAREST_AVX512_H

#include <immintrin.h>

#include "cpu/nearest_simd.h"

namespace vqk {
namespace {

struct Avx512Base {
  typedef __m512 V;
  static constexpr int lanes = 16, registers = 32;
  VQK_SIMD_FLOAT_SUMS(V)

  VQK_INLINE V set(float value) { return _mm512_set1_ps(value); }
  VQK_INLINE V zero() { return _mm512_setzero_ps(); }
  VQK_INLINE V lowest() { return set(-INFINITY); }
  VQK_INLINE V broadcast(const float *p) { return _mm512_set1_ps(*p); }
  VQK_INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
  VQK_INLINE void store(float *p, V v) { _mm512_storeu_ps(p, v); }
  VQK_INLINE V multiply(V a, V b) { return _mm512_mul_ps(a, b); }
  VQK_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  VQK_INLINE V subtract(V a, V b) { return _mm512_sub_ps(a, b); }
  VQK_INLINE V divide(V a, V b) { return _mm512_div_ps(a, b); }
  VQK_INLINE V sqrt(V v) { return _mm512_sqrt_ps(v); }
  VQK_INLINE V load_part(const float *p, int count) { return _mm512_maskz_loadu_ps(tail_mask(count), p); }
  // The sum of each of 16 vectors, in a lane of its own.
  VQK_INLINE V totals(const float *vectors) {
    V t[8], u[4], w[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const V a = load(vectors + 32 * i), b = load(vectors + 32 * i + 16);
      t[i] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
      u[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      w[i] = add(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x44), _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xee));
    return add(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
  }
  VQK_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
  VQK_INLINE uint32_t at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

  VQK_INLINE void transpose(const uint32_t *in, int64_t in_pitch, uint32_t *out, int64_t out_pitch) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * in_pitch);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 8] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_si512(out + i * out_pitch, _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88));
      _mm512_storeu_si512(out + (i + 4) * out_pitch, _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88));
      _mm512_storeu_si512(out + (i + 8) * out_pitch, _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd));
      _mm512_storeu_si512(out + (i + 12) * out_pitch, _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd));
    }
  }

  VQK_INLINE __m512d widen(const float *p, __mmask8 mask) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, p)); }
  VQK_INLINE __m512d widen(const double *p, __mmask8 mask) { return _mm512_maskz_loadu_pd(mask, p); }
  VQK_INLINE __m512d widen(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  VQK_INLINE __m512d widen(const double *p) { return _mm512_loadu_pd(p); }

  // Adds 8 columns of products to the sums of 8 pairs, in ascending d.
  VQK_INLINE __m512d add_columns(__m512d total, const __m512d *p) {
    __m512d t[8], r[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm512_unpacklo_pd(p[2 * i], p[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_pd(p[2 * i], p[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      r[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
      r[i + 2] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
      r[i + 4] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
      r[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    }
    total = _mm512_add_pd(total, _mm512_shuffle_f64x2(r[0], r[2], 0x88));
    total = _mm512_add_pd(total, _mm512_shuffle_f64x2(r[1], r[3], 0x88));
    total = _mm512_add_pd(total, _mm512_shuffle_f64x2(r[4], r[6], 0x88));
    total = _mm512_add_pd(total, _mm512_shuffle_f64x2(r[5], r[7], 0x88));
    total = _mm512_add_pd(total, _mm512_shuffle_f64x2(r[0], r[2], 0xdd));
    total = _mm512_add_pd(total, _mm512_shuffle_f64x2(r[1], r[3], 0xdd));
    total = _mm512_add_pd(total, _mm512_shuffle_f64x2(r[4], r[6], 0xdd));
    return _mm512_add_pd(total, _mm512_shuffle_f64x2(r[5], r[7], 0xdd));
  }

  // 8 pairs in the lanes of one sum: products are formed along d, then transposed. Masked-out dims add +0, which changes nothing.
  template <bool L2, class X, class E>
  VQK_INLINE void decide(const X *const *x, const E *const *e, int64_t dim, double *out) {
    __m512d total = _mm512_setzero_pd();
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) {
      __m512d p[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512d a = widen(x[i] + d), b = widen(e[i] + d), difference = _mm512_sub_pd(a, b);
        p[i] = L2 ? _mm512_mul_pd(difference, difference) : _mm512_mul_pd(a, b);
      }
      total = add_columns(total, p);
    }
    if (d < dim) {
      const __mmask8 mask = static_cast<__mmask8>((1u << (dim - d)) - 1);
      __m512d p[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512d a = widen(x[i] + d, mask), b = widen(e[i] + d, mask), difference = _mm512_sub_pd(a, b);
        p[i] = L2 ? _mm512_mul_pd(difference, difference) : _mm512_mul_pd(a, b);
      }
      total = add_columns(total, p);
    }
    _mm512_storeu_pd(out, total);
  }

  VQK_INLINE __mmask16 tail_mask(int64_t left) {
    return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
  }
};

}  // namespace
}  // namespace vqk

#endif
