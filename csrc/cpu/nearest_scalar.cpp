// Any machine: 4 lanes in the compiler's portable vectors (SSE2, NEON, or plain code).
#include "cpu/nearest_direct.h"
#include "cpu/nearest_simd.h"

namespace vqk {
namespace {

struct Portable {
  static constexpr bool splits = false;
  typedef float V __attribute__((vector_size(16), aligned(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  typedef V O;
  static constexpr int lanes = 4, registers = 16, row_vectors = 2, code_tile = 4, dims_per_step = 1;

  VQK_SIMD_FLOAT_SUMS(V)
  VQK_INLINE V set(float value) { return V{value, value, value, value}; }
  VQK_INLINE V zero() { return set(0.0f); }
  VQK_INLINE V lowest() { return set(-INFINITY); }
  VQK_INLINE V broadcast(const float *p) { return set(*p); }
  VQK_INLINE V load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
  VQK_INLINE void store(float *p, V v) { *reinterpret_cast<Unaligned *>(p) = v; }
  VQK_INLINE void keep(O *) {}
  VQK_INLINE O load_operand(const uint32_t *p) { return load(reinterpret_cast<const float *>(p)); }
  VQK_INLINE O broadcast_operand(const uint32_t *p) { return set(bits_to_float(*p)); }
  VQK_INLINE V multiply_add(O a, O b, V c) { return a * b + c; }
  VQK_INLINE V multiply(V a, V b) { return a * b; }
  VQK_INLINE V add(V a, V b) { return a + b; }
  VQK_INLINE V subtract(V a, V b) { return a - b; }
  VQK_INLINE V divide(V a, V b) { return a / b; }
  VQK_INLINE V sqrt(V v) { return V{std::sqrt(v[0]), std::sqrt(v[1]), std::sqrt(v[2]), std::sqrt(v[3])}; }
  VQK_INLINE V load_part(const float *p, int count) {
    return V{p[0], count > 1 ? p[1] : 0.0f, count > 2 ? p[2] : 0.0f, 0.0f};  // count is 1 to 3
  }
  VQK_INLINE float sum(V v) { return v[0] + v[1] + v[2] + v[3]; }
  // The sum of each of 4 vectors, in a lane of its own.
  VQK_INLINE V totals(const float *v) { return V{sum(load(v)), sum(load(v + 4)), sum(load(v + 8)), sum(load(v + 12))}; }
  VQK_INLINE V max(V a, V b) { return a > b ? a : b; }
  VQK_INLINE uint32_t at_least(V a, V b) {
    const Mask m = a >= b;
    return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u);
  }
  VQK_INLINE void transpose(const uint32_t *in, int64_t in_pitch, uint32_t *out, int64_t out_pitch) {
    for (int i = 0; i < lanes; ++i)
      for (int j = 0; j < lanes; ++j) out[j * out_pitch + i] = in[i * in_pitch + j];
  }
  VQK_INLINE int64_t used_steps(int64_t dim) { return dim; }
  static Quantised quantise(const float *x, const float *centre, float scale, int64_t dim, uint32_t *out) {
    V sum = zero();
    int64_t d = 0;
    for (; d + lanes <= dim; d += lanes) {
      const V v = (load(x + d) - load(centre + d)) * scale;
      store(reinterpret_cast<float *>(out) + d, v);
      sum += v * v;
    }
    float total = sum[0] + sum[1] + sum[2] + sum[3];
    for (; d < dim; ++d) {
      const float v = (x[d] - centre[d]) * scale;
      out[d] = float_to_bits(v);
      total += v * v;
    }
    return {total, 0, 1};
  }
  template <bool L2, class X, class E>
  VQK_INLINE void decide(const X *const *x, const E *const *e, int64_t dim, double *out) {
    decide_plain<L2>(x, e, dim, out);
  }
  VQK_SIMD_POLICY_MEMBERS(Portable)
  template <class Emit>
  VQK_INLINE void candidates(Block *block, int64_t tile, const float *threshold, const Emit &emit) {
    candidates_simd<Portable>(block, tile, threshold, emit);
  }
};

}  // namespace

const Kernels kernels_scalar = {Portable::dims_per_step,
                                1,
                                Portable::lanes,
                                Portable::lanes * Portable::row_vectors,
                                192,
                                pack_codes<Portable, Interleaved>,
                                exclude_by_bias,
                                prepare_rows<Portable>,
                                screen_simd<Portable>,
                                finish_block<Portable>,
                                direct_screen<Portable>,
                                direct_finish<Portable>};

}  // namespace vqk
