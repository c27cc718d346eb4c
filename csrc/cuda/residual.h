// residual_nearest on CUDA: the codebooks of all levels as a kernel sees them. residual_nearest.cu launches the kernels.
#ifndef VQK_CUDA_RESIDUAL_H
#define VQK_CUDA_RESIDUAL_H

#include "cuda/elements.cuh"

namespace vqk {
namespace residual {

constexpr int most_levels = 64;  // in one launch: the table of codebooks is a kernel's argument

struct Level {
  const void *data;
  int64_t head, code, dim;
  int32_t num_codes, dtype;
};
struct Levels {
  Level level[most_levels];
  int32_t count;
};

inline Levels levels_of(const vqk_codes *codebooks, int first, int count) {
  Levels levels{};
  levels.count = count;
  for (int q = 0; q < count; ++q) {
    const vqk_codes &e = codebooks[first + q];
    levels.level[q] = {e.data, e.stride[0], e.stride[1], e.stride[2], static_cast<int32_t>(e.size[1]), e.dtype};
  }
  return levels;
}

VQK_DEVICE float load_code(const Level &level, int64_t head, int64_t code, int64_t d) {
  return load<float>(level.data, level.dtype, head * level.head + code * level.code + d * level.dim);
}

}  // namespace residual
}  // namespace vqk

#endif
