// AVX-512: 6 rows by 4 vectors of 16 codes in 24 of the 32 registers.
#include <immintrin.h>

#include "cpu/soft_assign_simd.h"

namespace vqk {
namespace {

struct Avx512 {
  typedef __m512 V;
  static constexpr int lanes = 16, vectors = 4, tile = 6;

  VQK_INLINE V set(float value) { return _mm512_set1_ps(value); }
  VQK_INLINE V zero() { return _mm512_setzero_ps(); }
  VQK_INLINE V broadcast(const float *p) { return _mm512_set1_ps(*p); }
  VQK_INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
  VQK_INLINE void store(float *p, V v) { _mm512_storeu_ps(p, v); }
  VQK_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  VQK_INLINE V subtract(V a, V b) { return _mm512_sub_ps(a, b); }
  VQK_INLINE V multiply(V a, V b) { return _mm512_mul_ps(a, b); }
  VQK_INLINE V multiply_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  VQK_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }  // b if one is NaN
  // e 2^n where x is not less than kExpLeast, else 0.
  VQK_INLINE V scaled(V e, V n, V, V x) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set(kExpLeast), _CMP_NLT_UQ), e, n);
  }
};

}  // namespace

const SoftKernels soft_kernels_avx512 = soft_kernels<Avx512>();

}  // namespace vqk
