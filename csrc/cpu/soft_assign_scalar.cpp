// Any machine: 4 rows by 2 vectors of 4 codes in the compiler's portable vectors (SSE2, NEON, or plain code).
#include "cpu/soft_assign_simd.h"

namespace vqk {
namespace {

struct Portable {
  typedef float V __attribute__((vector_size(16), aligned(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4)));
  typedef int32_t Bits __attribute__((vector_size(16)));
  static constexpr int lanes = 4, vectors = 2, tile = 4;

  VQK_INLINE V set(float value) { return V{value, value, value, value}; }
  VQK_INLINE V zero() { return set(0.0f); }
  VQK_INLINE V broadcast(const float *p) { return set(*p); }
  VQK_INLINE V load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
  VQK_INLINE void store(float *p, V v) { *reinterpret_cast<Unaligned *>(p) = v; }
  VQK_INLINE V add(V a, V b) { return a + b; }
  VQK_INLINE V subtract(V a, V b) { return a - b; }
  VQK_INLINE V multiply(V a, V b) { return a * b; }
  VQK_INLINE V multiply_add(V a, V b, V c) { return a * b + c; }
  VQK_INLINE V max(V a, V b) { return a > b ? a : b; }  // b if one is NaN
  // e 2^n where x is not less than kExpLeast, else 0; n is in the low bits of `shifted`. A NaN might lose its bits there.
  VQK_INLINE V scaled(V e, V, V shifted, V x) {
    const Bits bits = reinterpret_cast<Bits>(e) + (reinterpret_cast<Bits>(shifted) << 23), less = x < set(kExpLeast);
    return reinterpret_cast<V>(bits & ~less) + x * 0.0f;
  }
};

}  // namespace

const SoftKernels soft_kernels_scalar = soft_kernels<Portable>();

}  // namespace vqk
