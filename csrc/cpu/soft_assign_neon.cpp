// NEON (aarch64): 6 rows by 3 vectors of 4 codes in 18 of the 32 registers.
#include <arm_neon.h>

#include "cpu/soft_assign_simd.h"

namespace vqk {
namespace {

struct Neon {
  typedef float32x4_t V;
  static constexpr int lanes = 4, vectors = 3, tile = 6;

  VQK_INLINE V set(float value) { return vdupq_n_f32(value); }
  VQK_INLINE V zero() { return set(0.0f); }
  VQK_INLINE V broadcast(const float *p) { return vld1q_dup_f32(p); }
  VQK_INLINE V load(const float *p) { return vld1q_f32(p); }
  VQK_INLINE void store(float *p, V v) { vst1q_f32(p, v); }
  VQK_INLINE V add(V a, V b) { return vaddq_f32(a, b); }
  VQK_INLINE V subtract(V a, V b) { return vsubq_f32(a, b); }
  VQK_INLINE V multiply(V a, V b) { return vmulq_f32(a, b); }
  VQK_INLINE V multiply_add(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  VQK_INLINE V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b if one is NaN
  // e 2^n where x is not less than kExpLeast, else 0; n is in the low bits of `shifted`. A NaN might lose its bits there.
  VQK_INLINE V scaled(V e, V, V shifted, V x) {
    const uint32x4_t bits = vaddq_u32(vreinterpretq_u32_f32(e), vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23));
    const uint32x4_t kept = vbicq_u32(bits, vcltq_f32(x, set(kExpLeast)));
    return multiply_add(x, zero(), vreinterpretq_f32_u32(kept));
  }
};

}  // namespace

const SoftKernels soft_kernels_neon = soft_kernels<Neon>();

}  // namespace vqk
