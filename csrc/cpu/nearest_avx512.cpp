// AVX-512: float32 screen, 8 codes x 3 vectors of 16 rows in 24 of the 32 registers.
#include "cpu/nearest_avx512.h"
#include "cpu/nearest_direct.h"

namespace vqk {
namespace {

struct Avx512 : Avx512Base {
  static constexpr bool splits = false;
  typedef __m512 O;
  static constexpr int row_vectors = 3, code_tile = 8, dims_per_step = 1;

  VQK_INLINE void keep(O *v) { __asm__("" : "+v"(*v)); }  // in a register from here on
  VQK_INLINE O load_operand(const uint32_t *p) { return load(reinterpret_cast<const float *>(p)); }
  VQK_INLINE O broadcast_operand(const uint32_t *p) { return broadcast(reinterpret_cast<const float *>(p)); }
  VQK_INLINE V multiply_add(O a, O b, V c) { return _mm512_fmadd_ps(a, b, c); }

  VQK_INLINE int64_t used_steps(int64_t dim) { return dim; }
  static Quantised quantise(const float *x, const float *centre, float scale, int64_t dim, uint32_t *out) {
    __m512 sum = zero();
    const __m512 factor = set(scale);
    for (int64_t d = 0; d < dim; d += 16) {
      const __mmask16 mask = tail_mask(dim - d);
      const __m512 v =
          _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + d), _mm512_maskz_loadu_ps(mask, centre + d)), factor);
      _mm512_mask_storeu_ps(out + d, mask, v);
      sum = _mm512_fmadd_ps(v, v, sum);
    }
    return {_mm512_reduce_add_ps(sum), 0, 1};
  }
  VQK_SIMD_POLICY_MEMBERS(Avx512)
  template <class Emit>
  VQK_INLINE void candidates(Block *block, int64_t tile, const float *threshold, const Emit &emit) {
    candidates_simd<Avx512>(block, tile, threshold, emit);
  }
};

}  // namespace

const Kernels kernels_avx512 = {Avx512::dims_per_step,
                                1,
                                Avx512::lanes,
                                Avx512::lanes * Avx512::row_vectors,
                                240,
                                pack_codes<Avx512, Interleaved>,
                                exclude_by_bias,
                                prepare_rows<Avx512>,
                                screen_simd<Avx512>,
                                finish_block<Avx512>,
                                direct_screen<Avx512>,
                                direct_finish<Avx512>};

}  // namespace vqk
