// NEON (aarch64), 4 lanes: 4 codes x 4 vectors of rows in 16 of the 32 registers, which leaves room for the operands of a step
// that gcc 12 loads all at once (8 x 3 spilled).
#include <arm_neon.h>

#include "cpu/nearest_direct.h"
#include "cpu/nearest_simd.h"

namespace vqk {
namespace {

struct Neon {
  static constexpr bool splits = false;
  typedef float32x4_t V;
  typedef float32x4_t O;
  static constexpr int lanes = 4, registers = 32, row_vectors = 4, code_tile = 4, dims_per_step = 1;

  VQK_SIMD_FLOAT_SUMS(V)
  VQK_INLINE V set(float value) { return vdupq_n_f32(value); }
  VQK_INLINE V zero() { return set(0.0f); }
  VQK_INLINE V lowest() { return set(-INFINITY); }
  VQK_INLINE V broadcast(const float *p) { return vld1q_dup_f32(p); }
  VQK_INLINE V load(const float *p) { return vld1q_f32(p); }
  VQK_INLINE void store(float *p, V v) { vst1q_f32(p, v); }
  VQK_INLINE void keep(O *v) { __asm__("" : "+w"(*v)); }  // in a register from here on
  VQK_INLINE O load_operand(const uint32_t *p) { return load(reinterpret_cast<const float *>(p)); }
  VQK_INLINE O broadcast_operand(const uint32_t *p) { return broadcast(reinterpret_cast<const float *>(p)); }
  VQK_INLINE V multiply_add(O a, O b, V c) { return vfmaq_f32(c, a, b); }
  VQK_INLINE V multiply(V a, V b) { return vmulq_f32(a, b); }
  VQK_INLINE V add(V a, V b) { return vaddq_f32(a, b); }
  VQK_INLINE V subtract(V a, V b) { return vsubq_f32(a, b); }
  VQK_INLINE V divide(V a, V b) { return vdivq_f32(a, b); }
  VQK_INLINE V sqrt(V v) { return vsqrtq_f32(v); }
  VQK_INLINE V load_part(const float *p, int count) {
    const V first = vsetq_lane_f32(p[0], zero(), 0);  // count is 1 to 3
    const V second = count > 1 ? vsetq_lane_f32(p[1], first, 1) : first;
    return count > 2 ? vsetq_lane_f32(p[2], second, 2) : second;
  }
  VQK_INLINE float sum(V v) { return vaddvq_f32(v); }
  // The sum of each of 4 vectors, in a lane of its own.
  VQK_INLINE V totals(const float *v) {
    return vpaddq_f32(vpaddq_f32(load(v), load(v + 4)), vpaddq_f32(load(v + 8), load(v + 12)));
  }
  VQK_INLINE V max(V a, V b) { return vmaxnmq_f32(a, b); }  // the number if one is NaN
  VQK_INLINE uint32_t at_least(V a, V b) {
    const uint32_t bit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), vld1q_u32(bit)));
  }
  VQK_INLINE void transpose(const uint32_t *in, int64_t in_pitch, uint32_t *out, int64_t out_pitch) {
    const uint32x4_t a = vld1q_u32(in), b = vld1q_u32(in + in_pitch), c = vld1q_u32(in + 2 * in_pitch),
                     d = vld1q_u32(in + 3 * in_pitch);
    const uint64x2_t even_low = vreinterpretq_u64_u32(vtrn1q_u32(a, b)), odd_low = vreinterpretq_u64_u32(vtrn2q_u32(a, b));
    const uint64x2_t even_high = vreinterpretq_u64_u32(vtrn1q_u32(c, d)), odd_high = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
    vst1q_u32(out, vreinterpretq_u32_u64(vtrn1q_u64(even_low, even_high)));
    vst1q_u32(out + out_pitch, vreinterpretq_u32_u64(vtrn1q_u64(odd_low, odd_high)));
    vst1q_u32(out + 2 * out_pitch, vreinterpretq_u32_u64(vtrn2q_u64(even_low, even_high)));
    vst1q_u32(out + 3 * out_pitch, vreinterpretq_u32_u64(vtrn2q_u64(odd_low, odd_high)));
  }
  VQK_INLINE int64_t used_steps(int64_t dim) { return dim; }
  static Quantised quantise(const float *x, const float *centre, float scale, int64_t dim, uint32_t *out) {
    V sum = zero();
    int64_t d = 0;
    for (; d + lanes <= dim; d += lanes) {
      const V v = vmulq_n_f32(vsubq_f32(load(x + d), load(centre + d)), scale);
      store(reinterpret_cast<float *>(out) + d, v);
      sum = vfmaq_f32(sum, v, v);
    }
    float total = vaddvq_f32(sum);
    for (; d < dim; ++d) {
      const float v = (x[d] - centre[d]) * scale;
      out[d] = float_to_bits(v);
      total += v * v;
    }
    return {total, 0, 1};
  }
  VQK_INLINE float64x2_t widen(const float *p) { return vcvt_f64_f32(vld1_f32(p)); }
  VQK_INLINE float64x2_t widen(const double *p) { return vld1q_f64(p); }
  // Two pairs in the lanes of one sum: products are formed along d, then transposed, so that every lane adds in ascending d.
  template <bool L2, class X, class E>
  VQK_INLINE void decide(const X *const *x, const E *const *e, int64_t dim, double *out) {
    float64x2_t total[4] = {vdupq_n_f64(0), vdupq_n_f64(0), vdupq_n_f64(0), vdupq_n_f64(0)};
    int64_t d = 0;
    for (; d + 2 <= dim; d += 2) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float64x2_t p = product<L2>(widen(x[2 * i] + d), widen(e[2 * i] + d));
        const float64x2_t q = product<L2>(widen(x[2 * i + 1] + d), widen(e[2 * i + 1] + d));
        total[i] = vaddq_f64(vaddq_f64(total[i], vzip1q_f64(p, q)), vzip2q_f64(p, q));
      }
    }
    for (int i = 0; i < 4; ++i) vst1q_f64(out + 2 * i, total[i]);
    if (d < dim) {
      for (int i = 0; i < 8; ++i) {
        const double a = static_cast<double>(x[i][d]), b = static_cast<double>(e[i][d]);
        out[i] += L2 ? (a - b) * (a - b) : a * b;
      }
    }
  }
  template <bool L2>
  VQK_INLINE float64x2_t product(float64x2_t a, float64x2_t b) {
    const float64x2_t difference = vsubq_f64(a, b);
    return L2 ? vmulq_f64(difference, difference) : vmulq_f64(a, b);
  }
  VQK_SIMD_POLICY_MEMBERS(Neon)
  template <class Emit>
  VQK_INLINE void candidates(Block *block, int64_t tile, const float *threshold, const Emit &emit) {
    candidates_simd<Neon>(block, tile, threshold, emit);
  }
};

}  // namespace

const Kernels kernels_neon = {Neon::dims_per_step,
                              1,
                              Neon::lanes,
                              Neon::lanes * Neon::row_vectors,
                              192,
                              pack_codes<Neon, Interleaved>,
                              exclude_by_bias,
                              prepare_rows<Neon>,
                              screen_simd<Neon>,
                              finish_block<Neon>,
                              direct_screen<Neon>,
                              direct_finish<Neon>};

}  // namespace vqk
