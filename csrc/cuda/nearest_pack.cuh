// Kernels that bring codes and rows into screen units: float16 operands in swizzled tiles, and what the error bound needs.
//
// The bound and its constants are those of docs/gpu.md; powers of two are named where they stand. Sums of squares are
// float32 in any order: the bound counts (dim + 32) roundings of 2^-23.
#ifndef VQK_CUDA_NEAREST_PACK_CUH
#define VQK_CUDA_NEAREST_PACK_CUH

#include "cuda/nearest.h"

namespace vqk {
namespace nearest {

VQK_DEVICE float sum_warp(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}
VQK_DEVICE float max_warp(float value) {
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

// q of a head, so that its largest |e - c| becomes at least 2^14 and less than 2^15. "cosine" scales each code instead.
VQK_DEVICE int code_exponent(const Search &s, int head) {
  if (s.metric == VQK_COSINE) return 14;
  const uint32_t top = static_cast<uint32_t>(s.head_state[2 * head]);
  if (top == 0) return 15;
  return min(max(15 - (static_cast<int>(top >> 23) - 126), -120), 100);
}
// A code of infinities may win, or all codes are tiny: no bound holds.
VQK_DEVICE bool head_scanned(const Search &s, int head) {
  const float top = __int_as_float(s.head_state[2 * head]);
  return s.head_state[2 * head + 1] != 0 || (top > 0 && top < 0x1p-60f);
}

struct CentreShared {
  float sum[8][32];
};
// The mean of up to 1024 codes in a fixed order; clears what later kernels count in. Grid: (32 dims each, heads).
__global__ void __launch_bounds__(256) pack_centre(const Search s) {
  start_kernel();
  CentreShared &shared = shared_memory<CentreShared>();
  const int head = static_cast<int>(blockIdx.y), column = lane(), d = static_cast<int>(blockIdx.x) * 32 + column;
  const int count = min(s.num_codes, centre_codes);
  float sum = 0;
  if (s.metric == VQK_L2 && d < s.dim)
    for (int i = warp(); i < count; i += 8) {
      const int64_t code = static_cast<int64_t>(i) * s.num_codes / count;
      sum += load_float(s.e, s.e_dtype, code_start(s, head, code) + d * s.e_dim);
    }
  shared.sum[warp()][column] = sum;
  __syncthreads();
  if (warp() == 0 && d < s.dim) {
    float total = 0;
    for (int i = 0; i < 8; ++i) total += shared.sum[i][column];
    total /= static_cast<float>(count);
    s.centre[static_cast<int64_t>(head) * s.dim + d] = finite(total) ? total : 0.0f;
  }
  if (blockIdx.x == 0 && threadIdx.x < 2) s.head_state[2 * head + static_cast<int>(threadIdx.x)] = 0;
}

struct Nothing {};

// Per code: the largest |e - c| or a mark, "cosine" also |e| in float64 in the contract's order. Grid: (32 codes each, heads).
__global__ void __launch_bounds__(256) pack_stats(const Search s) {
  start_kernel();
  const int head = static_cast<int>(blockIdx.y), first = static_cast<int>(blockIdx.x) * 32;
  const float *centre = s.centre + static_cast<int64_t>(head) * s.dim;
  float top = 0;
  bool scanned = false;
  for (int i = warp(); i < 32; i += 8) {
    const int code = first + i;
    if (code >= s.num_codes) break;
    const int64_t start = code_start(s, head, code);
    float most = 0;
    bool nan = false, wild = false;
    for (int d = lane(); d < s.dim; d += 32) {
      const float value = load_float(s.e, s.e_dtype, start + d * s.e_dim), shifted = value - centre[d];
      // An infinity is no winner but for "dot"; a finite value whose difference overflows may be one.
      const bool judged = s.metric == VQK_DOT ? fabsf(value) == INFINITY : finite(value) && !finite(shifted);
      wild |= judged;
      nan |= !finite(value) && !judged;
      if (finite(shifted)) most = fmaxf(most, fabsf(shifted));
    }
    most = max_warp(most);
    if (__any_sync(~0u, wild)) most = needs_scan;
    if (__any_sync(~0u, nan)) most = never_wins;
    scanned |= most == needs_scan;
    top = fmaxf(top, most);
    if (lane() == 0) s.largest[static_cast<int64_t>(head) * s.num_codes + code] = most;
  }
  if (lane() == 0) {
    atomicMax(&s.head_state[2 * head], __float_as_int(top));
    if (scanned) atomicOr(&s.head_state[2 * head + 1], 1);
  }
  if (s.metric == VQK_COSINE && threadIdx.x < 32 && first + lane() < s.num_codes) {
    const int64_t start = code_start(s, head, first + lane());
    double total = 0;
    for (int d = 0; d < s.dim; ++d) {
      const double value = load_float(s.e, s.e_dtype, start + d * s.e_dim);
      total = __dadd_rn(total, __dmul_rn(value, value));
    }
    s.norms[static_cast<int64_t>(head) * s.num_codes + first + lane()] = __dsqrt_rn(total);
  }
}

// Dims of the operands that hold the bias, from `first_bias` on.
VQK_DEVICE int first_bias(const Search &s) { return s.layout.split ? 3 * s.dim : s.dim; }
VQK_DEVICE bool is_bias(const Search &s, int j) {
  return s.layout.folded && static_cast<uint32_t>(j - first_bias(s)) < static_cast<uint32_t>(bias_dims);
}

constexpr int pack_threads = 512;  // a warp packs one code after the other, and 16384 codes are 128 tiles only
struct CodesShared {
  float bounds[pack_threads / 32][3];
};
// One tile of codes: operands, biases -|b|^2 / 2 (in the operands or behind them), and the tile's largest (reach, spread,
// offset). Grid: (tiles, heads).
__global__ void __launch_bounds__(pack_threads) pack_codes(const Search s) {
  start_kernel();
  CodesShared &shared = shared_memory<CodesShared>();
  const int head = static_cast<int>(blockIdx.y), tile = static_cast<int>(blockIdx.x);
  const int width = s.layout.width, pitch = 2 * width, dims = width * s.layout.panels;
  const float *centre = s.centre + static_cast<int64_t>(head) * s.dim;
  unsigned char *out = s.codes + (static_cast<int64_t>(head) * s.tiles + tile) * s.tile_bytes;
  float *trailer = reinterpret_cast<float *>(out + s.layout.panels * tile_codes * pitch);
  const float scale = power(code_exponent(s, head));
  const float sums = 0x1p-23f * static_cast<float>(s.dim + 32);     // rounding of the float32 sums of squares
  const float floor = 0x1p-124f * static_cast<float>(s.dim + 32);   // squares that underflow
  const float decision = 0x1p-49f * static_cast<float>(s.dim + 4);  // rounding of the float64 decision
  float most_reach = 0, most_spread = 0, most_offset = 0;
  for (int i = warp(); i < tile_codes; i += pack_threads / 32) {
    const int code = tile * tile_codes + i;
    const int64_t at = static_cast<int64_t>(head) * s.num_codes + code;
    const bool usable = code < s.num_codes && s.largest[at] >= 0;
    const int64_t start = code_start(s, head, code);
    double inverse = 0;
    if (s.metric == VQK_COSINE && usable && s.norms[at] > 0) inverse = 16384.0 / s.norms[at];
    float square = 0, error = 0;
    for (int j = lane(); j < dims; j += 32) {
      if (is_bias(s, j)) continue;
      const int part = s.layout.split ? j / s.dim : 0, d = j - part * s.dim;
      float value = 0;
      if (usable && part < 3 && d < s.dim) {
        value = load_float(s.e, s.e_dtype, start + d * s.e_dim);
        value = s.metric == VQK_COSINE ? static_cast<float>(static_cast<double>(value) * inverse) : (value - centre[d]) * scale;
      }
      const uint16_t high = float_to_half(value);
      uint16_t operand = high;
      float rest = value - half_to_float(high);
      if (s.layout.split) {  // codes are [e1 e1 e2], rows [x1 x2 x1]
        const uint16_t low = float_to_half(rest);
        rest -= half_to_float(low);
        if (part == 2) operand = low;
      }
      *reinterpret_cast<uint16_t *>(out + j / width * (tile_codes * pitch) +
                                    swizzled(column_of_code(i), 2 * (j % width), pitch)) = operand;
      if (part == 0) {
        square += value * value;
        error += rest * rest;
      }
    }
    square = sum_warp(square);
    error = sum_warp(error);
    const float reach = sqrtf(square * (1 + sums) + floor) * 1.000004f;
    // 2^-22 |b|: rounding of e - c and of the conversion to float32.
    const float residual = sqrtf(error * (1 + sums) + floor) * 1.000004f + 0x1p-22f * reach;
    const float half = s.metric == VQK_L2 ? square / 2 : 0.0f;
    if (s.layout.folded && lane() < bias_dims) {
      // Its 24 bits in three times 11; below 29 * 2^11, float16's range. A code that cannot win is minus infinity.
      float rest = half * power(-bias_exponent);
      for (int k = 0; k < lane(); ++k) rest -= half_to_float(float_to_half(rest));
      const float part = usable ? -rest : lane() == 0 ? -INFINITY : 0.0f;
      *reinterpret_cast<uint16_t *>(out + swizzled(column_of_code(i), 2 * (first_bias(s) + lane()), pitch)) = float_to_half(part);
    }
    float spread = s.keep * residual + (s.accumulation + decision) * (reach + residual) * 1.02f + 0x1p-21f * reach;
    // x2.e2 is left out: |x2| <= 2^-11 |x|, |e2| <= 2^-11 |e|, plus float16's subnormal steps.
    if (s.layout.split) spread += 0x1p-21f * reach + 0x1p-30f;
    // Products that fold the bias in add up to (1 + 2^-10) of it; 2^-25 of their unit, 2^18, is lost to subnormal float16.
    const float offset = half * (s.accumulation * 1.002f + sums + 0x1p-21f + decision) + (s.layout.folded ? 0x1p-7f : 0x1p-100f);
    if (lane() == 0) trailer[i] = !usable ? -INFINITY : s.layout.folded ? 0.0f : -half;
    if (usable) {
      most_reach = fmaxf(most_reach, reach);
      most_spread = fmaxf(most_spread, spread);
      most_offset = fmaxf(most_offset, offset);
    }
  }
  if (lane() == 0) {
    shared.bounds[warp()][0] = most_reach;
    shared.bounds[warp()][1] = most_spread;
    shared.bounds[warp()][2] = most_offset;
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    float most = 0;
    for (int i = 0; i < pack_threads / 32; ++i) most = fmaxf(most, shared.bounds[i][threadIdx.x]);
    trailer[tile_codes + static_cast<int>(threadIdx.x)] = most * 1.000008f;  // bound() rounds as it likes
  }
}

constexpr int rows_per_block = 32;
struct RowsShared {
  float value[rows_per_block][65];
  int64_t start[rows_per_block];
};

// Of a level of a residual search: one value less that of the row's code, or, `again`, what became of it. By the same thread.
VQK_DEVICE float next_residual(const Search &s, int head, int64_t n, int d, float value, bool again) {
  const int64_t row = head * s.num_rows + n;
  float *to = s.residual + row * s.dim + d;
  if (again) return *to;
  return *to = __fsub_rn(value, s.less_codes[(head * s.less_count + s.less_index[row]) * s.dim + d]);
}

// 64 dims of 32 rows, minus the centre: read along whichever of the two lies in a row in memory.
VQK_DEVICE void load_rows(const Search &s, RowsShared &shared, int head, int first, int first_dim, bool again) {
  const float *centre = s.centre + static_cast<int64_t>(head) * s.dim;
  const bool along_rows = s.x_row == 1 && s.x_dim != 1;
  for (int i = static_cast<int>(threadIdx.x); i < rows_per_block * 64; i += 256) {
    const int r = along_rows ? i % rows_per_block : i / 64, j = along_rows ? i / rows_per_block : i % 64;
    const int d = first_dim + j;
    float value = 0;
    if (first + r < s.rows && d < s.dim) {
      const int64_t n = s.first_row + first + r;
      if (s.residual == nullptr || !again) value = load_float(s.x, s.x_dtype, shared.start[r] + d * s.x_dim);
      if (s.residual != nullptr) value = next_residual(s, head, n, d, value, again);
      value -= centre[d];
    }
    shared.value[r][j] = value;
  }
}

// Rows of a chunk: operands, and per row f, |a|, |a - a^|, an offset, a state. Grid: (32 rows each, heads).
__global__ void __launch_bounds__(256, 3) pack_rows(const Search s) {
  start_kernel();
  RowsShared &shared = shared_memory<RowsShared>();
  const int head = static_cast<int>(blockIdx.y), first = static_cast<int>(blockIdx.x) * rows_per_block;
  if (first == 0 && threadIdx.x == 0) {
    s.counters[head] = 0;
    if (head == 0) s.counters[s.heads] = 0;
  }
  // Once per row: 64-bit divisions are subroutines.
  if (threadIdx.x < rows_per_block)
    shared.start[threadIdx.x] = row_start(s, head, s.first_row + first + static_cast<int>(threadIdx.x));
  __syncthreads();
  float most[4] = {0, 0, 0, 0};
  bool nan[4] = {false, false, false, false}, wild[4] = {false, false, false, false};
  for (int first_dim = 0; first_dim < s.dim; first_dim += 64) {
    if (first_dim > 0) __syncthreads();
    load_rows(s, shared, head, first, first_dim, false);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      for (int j = lane(); j < 64; j += 32) {
        const float value = shared.value[warp() * 4 + i][j];
        nan[i] |= value != value;
        wild[i] |= fabsf(value) == INFINITY;
        if (finite(value)) most[i] = fmaxf(most[i], fabsf(value));
      }
  }
  const int q = code_exponent(s, head);
  const bool all_scanned = head_scanned(s, head);
  float f[4], scale[4], state[4], square[4] = {0, 0, 0, 0}, error[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    most[i] = max_warp(most[i]);
    const bool hopeless = __any_sync(~0u, nan[i]), bad = __any_sync(~0u, wild[i]);
    const int order = static_cast<int>(__float_as_uint(most[i]) >> 23) - 127;  // most in [2^order, 2^(order + 1))
    int p = 14 - order;
    // The exponent of the largest code is 14 - q: a row that dwarfs every code has no usable f.
    bool unsafe = bad || all_scanned || (most[i] > 0 && order < -100);
    if (s.metric == VQK_L2) {
      unsafe |= order - (14 - q) > (s.layout.folded ? 42 : 60);  // folded: f 2^18 must be a float16, 2^-24 to 2^15
      p = min(p, s.layout.folded ? q + 15 - bias_exponent : q + 40);
    }
    unsafe |= hopeless;
    p = unsafe ? 0 : min(max(p, -120), 120);
    scale[i] = power(p);
    f[i] = s.metric == VQK_L2 && !unsafe ? power(p - q) : 1.0f;
    state[i] = hopeless ? row_hopeless : unsafe ? row_scanned : row_searched;
  }
  const int width = s.layout.width, pitch = 2 * width, dims = width * s.layout.panels;
  for (int first_dim = 0; first_dim < dims; first_dim += 64) {
    if (s.dim > 64) {  // else the dims are still there
      __syncthreads();
      load_rows(s, shared, head, first, first_dim, true);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + warp() * 4 + i;
      unsigned char *out =
          s.packed + (static_cast<int64_t>(head) * (s.rows_padded / row_block) + row / row_block) * block_bytes(s);
      for (int j = first_dim + lane(); j < min(first_dim + 64, dims); j += 32) {
        if (is_bias(s, j)) {
          const float factor = state[i] == row_searched && s.metric == VQK_L2 ? f[i] * power(bias_exponent) : 1.0f;
          *reinterpret_cast<uint16_t *>(out + swizzled(row % row_block, 2 * j, pitch)) = float_to_half(factor);
          continue;
        }
        const int part = s.layout.split ? j / s.dim : 0, d = j - part * s.dim;
        float value = 0;
        if (state[i] == row_searched && part < 3 && d < s.dim) value = shared.value[warp() * 4 + i][d % 64] * scale[i];
        const uint16_t high = float_to_half(value);
        uint16_t operand = high;
        float rest = value - half_to_float(high);
        if (s.layout.split) {
          const uint16_t low = float_to_half(rest);
          rest -= half_to_float(low);
          if (part == 1) operand = low;
        }
        *reinterpret_cast<uint16_t *>(out + j / width * (row_block * pitch) + swizzled(row % row_block, 2 * (j % width), pitch)) =
            operand;
        if (part == 0) {
          square[i] += value * value;
          error[i] += rest * rest;
        }
      }
    }
  }
  const float sums = 0x1p-23f * static_cast<float>(s.dim + 32), floor = 0x1p-124f * static_cast<float>(s.dim + 32);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first + warp() * 4 + i;
    const float length = sqrtf(sum_warp(square[i]) * (1 + sums) + floor) * 1.000004f;
    const float residual = sqrtf(sum_warp(error[i]) * (1 + sums) + floor) * 1.000004f + 0x1p-22f * length;
    if (lane() != 0) continue;
    float *at = s.info + static_cast<int64_t>(head) * 5 * s.rows_padded + row;
    const int64_t step = s.rows_padded;
    at[0] = f[i];
    at[step] = (length + residual) * 1.000004f;
    at[2 * step] = s.keep * residual;
    at[3 * step] = s.metric == VQK_L2 ? 0x1.0001p-49f * static_cast<float>(s.dim + 4) * length * (length / f[i]) : 0.0f;
    at[4 * step] = row < s.rows ? state[i] : row_hopeless;
  }
}

}  // namespace nearest
}  // namespace vqk

#endif
