// AVX512-BF16: bf16 screen with VDPBF16PS (pairs of dims), the register tile of the float32 build.
#include "cpu/nearest_bf16.h"

namespace vqk {
namespace {

struct Avx512Bf16 : Bf16Base {
  static constexpr bool splits = false;
  typedef __m512i O;
  static constexpr int row_vectors = 3, code_tile = 8;

  VQK_INLINE void keep(O *v) { __asm__("" : "+v"(*v)); }  // in a register from here on
  VQK_INLINE O load_operand(const uint32_t *p) { return _mm512_loadu_si512(p); }
  VQK_INLINE O broadcast_operand(const uint32_t *p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  VQK_INLINE V multiply_add(O a, O b, V c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  VQK_SIMD_POLICY_MEMBERS(Avx512Bf16)
  template <class Emit>
  VQK_INLINE void candidates(Block *block, int64_t tile, const float *threshold, const Emit &emit) {
    candidates_simd<Avx512Bf16>(block, tile, threshold, emit);
  }
};

}  // namespace

const Kernels kernels_avx512bf16 = {Avx512Bf16::dims_per_step,
                                    1,
                                    Avx512Bf16::lanes,
                                    Avx512Bf16::lanes * Avx512Bf16::row_vectors,
                                    240,
                                    pack_codes<Avx512Bf16, Interleaved>,
                                    exclude_by_bias,
                                    prepare_rows<Avx512Bf16>,
                                    screen_simd<Avx512Bf16>,
                                    finish_block<Avx512Bf16>,
                                    nullptr,
                                    nullptr};

}  // namespace vqk
