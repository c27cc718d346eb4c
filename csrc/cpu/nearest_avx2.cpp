// AVX2 with FMA, 8 lanes: two screens. Float32: 4 codes x 3 vectors of rows in 12 of the 16 registers. Int16: pairs of dims,
// vpmaddwd and vpaddd, half the instructions per pair and a third port for the addition; sums are exact in 32 bits.
#include <immintrin.h>

#include "cpu/nearest_direct.h"
#include "cpu/nearest_simd.h"

namespace vqk {
namespace {

struct Avx2Base {
  static constexpr bool splits = false;
  typedef __m256 V;
  static constexpr int lanes = 8, registers = 16;

  VQK_INLINE V set(float value) { return _mm256_set1_ps(value); }
  VQK_INLINE V zero() { return _mm256_setzero_ps(); }
  VQK_INLINE V lowest() { return set(-INFINITY); }
  VQK_INLINE V broadcast(const float *p) { return _mm256_broadcast_ss(p); }
  VQK_INLINE V load(const float *p) { return _mm256_loadu_ps(p); }
  VQK_INLINE void store(float *p, V v) { _mm256_storeu_ps(p, v); }
  VQK_INLINE V multiply(V a, V b) { return _mm256_mul_ps(a, b); }
  VQK_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  VQK_INLINE V subtract(V a, V b) { return _mm256_sub_ps(a, b); }
  VQK_INLINE V divide(V a, V b) { return _mm256_div_ps(a, b); }
  VQK_INLINE V sqrt(V v) { return _mm256_sqrt_ps(v); }
  VQK_INLINE V load_part(const float *p, int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
  }
  // The sum of each of 8 vectors, in a lane of its own.
  VQK_INLINE V totals(const float *vectors) {
    V pairs[4];
    for (int i = 0; i < 4; ++i) pairs[i] = _mm256_hadd_ps(load(vectors + 16 * i), load(vectors + 16 * i + 8));
    const V low = _mm256_hadd_ps(pairs[0], pairs[1]), high = _mm256_hadd_ps(pairs[2], pairs[3]);
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }
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
};

struct Avx2 : Avx2Base {
  typedef __m256 O;
  static constexpr int row_vectors = 3, code_tile = 4, dims_per_step = 1;
  VQK_SIMD_FLOAT_SUMS(V)

  VQK_INLINE void keep(O *v) { __asm__("" : "+x"(*v)); }  // in a register from here on
  VQK_INLINE O load_operand(const uint32_t *p) { return load(reinterpret_cast<const float *>(p)); }
  VQK_INLINE O broadcast_operand(const uint32_t *p) { return broadcast(reinterpret_cast<const float *>(p)); }
  VQK_INLINE V multiply_add(O a, O b, V c) { return _mm256_fmadd_ps(a, b, c); }

  VQK_INLINE int64_t used_steps(int64_t dim) { return dim; }
  static Quantised quantise(const float *x, const float *centre, float scale, int64_t dim, uint32_t *out) {
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
    return {total, 0, 1};
  }
  VQK_SIMD_POLICY_MEMBERS(Avx2)
  template <class Emit>
  VQK_INLINE void candidates(Block *block, int64_t tile, const float *threshold, const Emit &emit) {
    candidates_simd<Avx2>(block, tile, threshold, emit);
  }
};

// Rows and codes as int16 times a factor of their own. The factor is the least that keeps |X| |E| below 2^31 (Cauchy-Schwarz), so
// no sum leaves 32 bits whatever D is: partial sums may wrap, the last one cannot.
struct Avx2Int16 : Avx2Base {
  typedef __m256i O;
  typedef __m256i A;
  static constexpr bool exact_sums = true;
  static constexpr int row_vectors = 2, code_tile = 4, dims_per_step = 2;

  using Avx2Base::add;
  VQK_INLINE A add(A a, A b) { return _mm256_add_epi32(a, b); }
  VQK_INLINE void keep(O *v) { __asm__("" : "+x"(*v)); }  // in a register from here on
  VQK_INLINE O load_operand(const uint32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
  VQK_INLINE O broadcast_operand(const uint32_t *p) { return _mm256_set1_epi32(static_cast<int>(*p)); }
  VQK_INLINE A multiply_add(O a, O b, A c) { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
  VQK_INLINE A start(V) { return _mm256_setzero_si256(); }
  VQK_INLINE V score(A sum, V row_factor, V factor, V bias) {
    return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), row_factor), factor, bias);
  }

  VQK_INLINE float largest(V v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  // Calls visit(d, values of dims d to d + 7, of d + 8 to d + 15); there are zeros beyond the last dim.
  template <class Visit>
  VQK_INLINE void for_each_16(const float *x, const float *centre, V scale, int64_t dim, const Visit &visit) {
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16)
      visit(d, multiply(subtract(load(x + d), load(centre + d)), scale),
            multiply(subtract(load(x + d + 8), load(centre + d + 8)), scale));
    if (d == dim) return;
    alignas(32) float rest[16] = {0}, rest_centre[16] = {0};
    std::memcpy(rest, x + d, static_cast<size_t>(dim - d) * sizeof(float));
    std::memcpy(rest_centre, centre + d, static_cast<size_t>(dim - d) * sizeof(float));
    visit(d, multiply(subtract(load(rest), load(rest_centre)), scale),
          multiply(subtract(load(rest + 8), load(rest_centre + 8)), scale));
  }

  VQK_INLINE int64_t used_steps(int64_t dim) { return (dim + 1) / 2; }
  static Quantised quantise(const float *x, const float *centre, float scale, int64_t dim, uint32_t *out) {
    const V unit = set(scale), sign = set(-0.0f);
    V square0 = zero(), square1 = zero(), most = zero();
    for_each_16(x, centre, unit, dim, [&](int64_t, V v0, V v1) {
      square0 = _mm256_fmadd_ps(v0, v0, square0);
      square1 = _mm256_fmadd_ps(v1, v1, square1);
      most = max(most, max(_mm256_andnot_ps(sign, v0), _mm256_andnot_ps(sign, v1)));
    });
    const float square = sum(add(square0, square1)), length = std::sqrt(square), peak = largest(most);
    std::memset(out, 0, static_cast<size_t>(used_steps(dim)) * sizeof(uint32_t));
    // So small that squares underflow, or not finite (then the row is scanned): zeros, and all of the row is error.
    if (!(peak > 0x1p-50f) || !(length < INFINITY)) return {square, square, 0};
    // |X|^2 < 2^31: rounding adds half a unit per dim, and the length was computed to a relative (D + 32) 2^-23.
    const float dims = static_cast<float>(dim);
    const float room = (46340.0f - 0.5f * std::sqrt(dims)) * (1.0f - 0x1p-23f * (dims + 32.0f));
    const float by_peak = peak * (1.0f / 32766.0f), by_length = length / room;
    const float factor = by_peak > by_length ? by_peak : by_length;
    const V inverse = set(1.0f / factor), back = set(factor);
    V error0 = zero(), error1 = zero();
    for_each_16(x, centre, unit, dim, [&](int64_t d, V v0, V v1) {
      const __m256i q0 = _mm256_cvtps_epi32(multiply(v0, inverse)), q1 = _mm256_cvtps_epi32(multiply(v1, inverse));
      const V r0 = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(q0), back, v0), r1 = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(q1), back, v1);
      error0 = _mm256_fmadd_ps(r0, r0, error0);
      error1 = _mm256_fmadd_ps(r1, r1, error1);
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q0, q1), 0xd8);
      if (d + 16 <= dim) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + d / 2), words);
      } else {
        alignas(32) uint32_t rest[8];
        _mm256_store_si256(reinterpret_cast<__m256i *>(rest), words);
        std::memcpy(out + d / 2, rest, static_cast<size_t>(used_steps(dim) - d / 2) * sizeof(uint32_t));
      }
    });
    return {square, sum(add(error0, error1)), factor};
  }
  VQK_SIMD_POLICY_MEMBERS(Avx2Int16)
  template <class Emit>
  VQK_INLINE void candidates(Block *block, int64_t tile, const float *threshold, const Emit &emit) {
    candidates_simd<Avx2Int16>(block, tile, threshold, emit);
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

const Kernels kernels_avx2_int16 = {Avx2Int16::dims_per_step,
                                    1,
                                    Avx2Int16::lanes,
                                    Avx2Int16::lanes * Avx2Int16::row_vectors,
                                    192,
                                    pack_codes<Avx2Int16, Interleaved>,
                                    exclude_by_bias,
                                    prepare_rows<Avx2Int16>,
                                    screen_simd<Avx2Int16>,
                                    finish_block<Avx2Int16>,
                                    direct_screen<Avx2>,
                                    direct_finish<Avx2>};

}  // namespace vqk
