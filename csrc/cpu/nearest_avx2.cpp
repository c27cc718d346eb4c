// AVX2 with FMA: float32 screen, 8 lanes, 4 codes x 3 vectors of rows in 12 of the 16 registers.
#include <immintrin.h>

#include "cpu/nearest_direct.h"
#include "cpu/nearest_simd.h"

namespace vqk {
namespace {

struct Avx2 {
  static constexpr bool splits = false;
  typedef __m256 V;
  typedef __m256 O;
  static constexpr int lanes = 8, row_vectors = 3, code_tile = 4, dims_per_step = 1;

  VQK_INLINE V set(float value) { return _mm256_set1_ps(value); }
  VQK_INLINE V zero() { return _mm256_setzero_ps(); }
  VQK_INLINE V lowest() { return set(-INFINITY); }
  VQK_INLINE V broadcast(const float *p) { return _mm256_broadcast_ss(p); }
  VQK_INLINE V load(const float *p) { return _mm256_loadu_ps(p); }
  VQK_INLINE void store(float *p, V v) { _mm256_storeu_ps(p, v); }
  VQK_INLINE void keep(O *v) { __asm__("" : "+x"(*v)); }  // in a register from here on
  VQK_INLINE O load_operand(const uint32_t *p) { return load(reinterpret_cast<const float *>(p)); }
  VQK_INLINE O broadcast_operand(const uint32_t *p) { return broadcast(reinterpret_cast<const float *>(p)); }
  VQK_INLINE V multiply_add(O a, O b, V c) { return _mm256_fmadd_ps(a, b, c); }
  VQK_INLINE V multiply(V a, V b) { return _mm256_mul_ps(a, b); }
  VQK_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  VQK_INLINE V subtract(V a, V b) { return _mm256_sub_ps(a, b); }
  VQK_INLINE float sum(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  VQK_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
  VQK_INLINE uint32_t at_least(V a, V b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ))); }
  VQK_INLINE void transpose(const uint32_t *in, int64_t in_pitch, uint32_t *out, int64_t out_pitch) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = load(reinterpret_cast<const float *>(in + i * in_pitch));
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      store(reinterpret_cast<float *>(out + i * out_pitch), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      store(reinterpret_cast<float *>(out + (i + 4) * out_pitch), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }
  VQK_INLINE int64_t used_steps(int64_t dim) { return dim; }
  static void quantise(const float *x, const float *centre, float scale, int64_t dim, uint32_t *out, float *square,
                       float *error) {
    __m256 sum = zero();
    const __m256 factor = set(scale);
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) {
      const __m256 v = _mm256_mul_ps(_mm256_sub_ps(load(x + d), load(centre + d)), factor);
      store(reinterpret_cast<float *>(out + d), v);
      sum = _mm256_fmadd_ps(v, v, sum);
    }
    float part[8], total = 0;
    store(part, sum);
    for (float p : part) total += p;
    for (; d < dim; ++d) {
      const float v = (x[d] - centre[d]) * scale;
      out[d] = float_to_bits(v);
      total += v * v;
    }
    *square = total;
    *error = 0;
  }

  VQK_INLINE __m256d widen(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  VQK_INLINE __m256d widen(const double *p) { return _mm256_loadu_pd(p); }
  // Four pairs in the lanes of one sum: products are formed along d, then transposed, so that every lane adds in ascending d.
  template <bool L2, class X, class E>
  VQK_INLINE void decide(const X *const *x, const E *const *e, int64_t dim, double *out) {
    for (int half = 0; half < 8; half += 4) {
      __m256d total = _mm256_setzero_pd();
      int64_t d = 0;
      for (; d + 4 <= dim; d += 4) {
        __m256d p[4];
        for (int i = 0; i < 4; ++i) {
          const __m256d a = widen(x[half + i] + d), b = widen(e[half + i] + d);
          const __m256d difference = _mm256_sub_pd(a, b);
          p[i] = L2 ? _mm256_mul_pd(difference, difference) : _mm256_mul_pd(a, b);
        }
        const __m256d t0 = _mm256_unpacklo_pd(p[0], p[1]), t1 = _mm256_unpackhi_pd(p[0], p[1]);
        const __m256d t2 = _mm256_unpacklo_pd(p[2], p[3]), t3 = _mm256_unpackhi_pd(p[2], p[3]);
        total = _mm256_add_pd(total, _mm256_permute2f128_pd(t0, t2, 0x20));
        total = _mm256_add_pd(total, _mm256_permute2f128_pd(t1, t3, 0x20));
        total = _mm256_add_pd(total, _mm256_permute2f128_pd(t0, t2, 0x31));
        total = _mm256_add_pd(total, _mm256_permute2f128_pd(t1, t3, 0x31));
      }
      _mm256_storeu_pd(out + half, total);
      for (; d < dim; ++d) {
        for (int i = half; i < half + 4; ++i) {
          const double a = static_cast<double>(x[i][d]), b = static_cast<double>(e[i][d]);
          out[i] += L2 ? (a - b) * (a - b) : a * b;
        }
      }
    }
  }
  VQK_SIMD_POLICY_MEMBERS(Avx2)
  template <class Emit>
  VQK_INLINE void candidates(Block *block, int64_t tile, const float *threshold, const Emit &emit) {
    candidates_simd<Avx2>(block, tile, threshold, emit);
  }
};

}  // namespace

const Kernels kernels_avx2 = {Avx2::dims_per_step,
                              1,
                              Avx2::lanes,
                              Avx2::lanes * Avx2::row_vectors,
                              192,
                              pack_codes<Avx2, Interleaved>,
                              exclude_by_bias,
                              prepare_rows<Avx2>,
                              screen_simd<Avx2>,
                              finish_block<Avx2>,
                              direct_screen<Avx2>,
                              direct_finish<Avx2>};

}  // namespace vqk
