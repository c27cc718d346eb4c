// What the screens keep of a row while codes stream by: the same for mma.sync and wgmma, whose quads hold the same columns.
//
// Per tile and row a thread has 16 or 32 scores of neighbouring codes. Each group of them costs a maximum per score
// and five operations; bounds, thresholds and lanes are not touched before the end.
#ifndef VQK_CUDA_NEAREST_EPILOGUE_CUH
#define VQK_CUDA_NEAREST_EPILOGUE_CUH

#include "cuda/nearest.h"

namespace vqk {
namespace nearest {

// Over the codes of one thread: the best lower bound, the best upper bound and its group, the best of all other groups.
struct Best {
  float lower, upper, second;
  int group;  // its first code / 8
};
VQK_DEVICE Best nothing_yet() { return {-INFINITY, -INFINITY, -INFINITY, 0}; }

// `count` groups of `span` scores t[i] = acc[4 (i / 2) + i % 2] + f bias[i], or without the bias where the sums have it
// (`folded`); the first one is of code 8 `group`.
template <int count, int span, bool folded, int biases>
VQK_DEVICE void keep_best(Best &best, const float *acc, const float (&bias)[biases], float f, float eps, int group) {
  float most = 0;
#pragma unroll
  for (int g = 0; g < count; ++g) {
    float t[4];  // four chains, so that no maximum waits for the one before
#pragma unroll
    for (int i = 0; i < span; ++i) {
      const int at = g * span + i;
      float score = acc[at / 2 * 4 + at % 2];
      if constexpr (!folded) score = __fmaf_rn(f, bias[at], score);
      t[i % 4] = i < 4 ? score : fmaxf(t[i % 4], score);
    }
    const float group_most = fmaxf(fmaxf(t[0], t[1]), fmaxf(t[2], t[3]));
    most = g == 0 ? group_most : fmaxf(most, group_most);
    const float high = group_most + eps;
    if (high > best.upper) best.group = group + g * (span / 8);
    best.second = fmaxf(best.second, fminf(best.upper, high));
    best.upper = fmaxf(best.upper, high);
  }
  best.lower = fmaxf(best.lower, most - eps);
}

// The sums behind these values are not needed any more: said before the products that overwrite them.
VQK_DEVICE void pin([[maybe_unused]] Best &best) {
#if defined(__CUDACC__)
  asm volatile("" : "+f"(best.lower), "+f"(best.upper), "+f"(best.second), "+r"(best.group)::"memory");
#endif
}

// 4 floats at a time.
template <class T>
VQK_DEVICE void load_bias(T &bias, const float *trailer) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 16); ++i) {
    const float4 four = reinterpret_cast<const float4 *>(trailer)[i];
    bias[4 * i] = four.x;
    bias[4 * i + 1] = four.y;
    bias[4 * i + 2] = four.z;
    bias[4 * i + 3] = four.w;
  }
}

VQK_DEVICE void store_best(const Search &s, int head, int list, int row, const Best &best) {
  s.part[(static_cast<int64_t>(head) * s.lists + list) * s.rows_padded + row] =
      make_float4(best.lower, best.upper, best.second, __int_as_float(best.group));
}

}  // namespace nearest
}  // namespace vqk

#endif
