// Rows to bf16 pairs, for the two instruction sets that screen in bf16 (AVX512-BF16 and AMX).
#ifndef VQK_CPU_NEAREST_BF16_H
#define VQK_CPU_NEAREST_BF16_H

#include "cpu/nearest_avx512.h"

namespace vqk {
namespace {

struct Bf16Base : Avx512Base {
  static constexpr int dims_per_step = 2;

  VQK_INLINE __m512 widen_bf16(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

  VQK_INLINE int64_t used_steps(int64_t dim) { return (dim + 1) / 2; }
  static Quantised quantise(const float *x, const float *centre, float scale, int64_t dim, uint32_t *out) {
    __m512 sum0 = zero(), sum1 = zero(), lost0 = zero(), lost1 = zero();
    const __m512 factor = set(scale);
    for (int64_t d = 0; d < dim; d += 32) {
      const __mmask16 m0 = tail_mask(dim - d), m1 = tail_mask(dim - d - 16);
      const __m512 v0 =
          _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m0, x + d), _mm512_maskz_loadu_ps(m0, centre + d)), factor);
      const __m512 v1 =
          _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m1, x + d + 16), _mm512_maskz_loadu_ps(m1, centre + d + 16)), factor);
      const __m512i pairs = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v1, v0));
      const __m512 r0 = _mm512_sub_ps(v0, widen_bf16(_mm512_castsi512_si256(pairs)));
      const __m512 r1 = _mm512_sub_ps(v1, widen_bf16(_mm512_extracti64x4_epi64(pairs, 1)));
      _mm512_mask_storeu_epi32(out + d / 2, tail_mask((dim - d + 1) / 2), pairs);
      sum0 = _mm512_fmadd_ps(v0, v0, sum0);
      sum1 = _mm512_fmadd_ps(v1, v1, sum1);
      lost0 = _mm512_fmadd_ps(r0, r0, lost0);
      lost1 = _mm512_fmadd_ps(r1, r1, lost1);
    }
    return {_mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1)), _mm512_reduce_add_ps(_mm512_add_ps(lost0, lost1)), 1};
  }
};

}  // namespace
}  // namespace vqk

#endif
