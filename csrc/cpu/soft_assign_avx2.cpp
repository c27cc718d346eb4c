// AVX2 with FMA: 6 rows by 2 vectors of 8 codes in 12 of the 16 registers.
#include <immintrin.h>

#include "cpu/soft_assign_simd.h"

namespace vqk {
namespace {

struct Avx2 {
  typedef __m256 V;
  static constexpr int lanes = 8, vectors = 2, tile = 6;

  VQK_INLINE V set(float value) { return _mm256_set1_ps(value); }
  VQK_INLINE V zero() { return _mm256_setzero_ps(); }
  VQK_INLINE V broadcast(const float *p) { return _mm256_broadcast_ss(p); }
  VQK_INLINE V load(const float *p) { return _mm256_loadu_ps(p); }
  VQK_INLINE void store(float *p, V v) { _mm256_storeu_ps(p, v); }
  VQK_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  VQK_INLINE V subtract(V a, V b) { return _mm256_sub_ps(a, b); }
  VQK_INLINE V multiply(V a, V b) { return _mm256_mul_ps(a, b); }
  VQK_INLINE V multiply_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  VQK_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }  // b if one is NaN
  // e 2^n where x is not less than kExpLeast, else 0; n is in the low bits of `shifted`. A NaN might lose its bits there.
  VQK_INLINE V scaled(V e, V, V shifted, V x) {
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(e), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
    const V kept = _mm256_and_ps(_mm256_castsi256_ps(bits), _mm256_cmp_ps(x, set(kExpLeast), _CMP_NLT_UQ));
    return multiply_add(x, zero(), kept);
  }
};

}  // namespace

const SoftKernels soft_kernels_avx2 = soft_kernels<Avx2>();

}  // namespace vqk
