// All levels of a residual search of a few rows in one cooperative launch: every pair in float64, in the contract's order.
//
// Tiles of up to 16 rows are each searched by a group of blocks that share the codes of a level: block `rank` of `group` takes
// every `group`-th tile of 32 codes. A lane has a code, a warp up to four rows; the rows' residuals stay in shared memory
// as doubles, the same in every block of a group. Codes come through registers one stage (64 dims of 32 codes) ahead,
// across levels too, for they do not depend on the residual. A level ends with what each block found for its rows, a barrier of
// the whole grid, and every block picking the winner of all and subtracting it: no order of blocks changes a bit.
#ifndef VQK_CUDA_RESIDUAL_FEW_CUH
#define VQK_CUDA_RESIDUAL_FEW_CUH

#include "cuda/residual.h"
#include "cuda/winner.cuh"

namespace vqk {
namespace residual {

constexpr int few_rows = 16, few_codes = 32, few_threads = 128, few_warps = few_threads / 32, stage_dims = 64;
constexpr int most_few_dims = 512;

struct Few {
  vqk_rows x, values;
  int32_t rows, dim, tile_rows, tiles, group;  // rows per head; rows of a tile; tiles of a head; blocks per tile
  double *found_value;                         // (2, heads * tiles, few_rows, group)
  int32_t *found_code;
  int64_t *indices;
  float *score;
};

template <int dims>
struct FewShared {
  double row[few_rows][dims + 2];  // even, so that two dims are read at once
  double code[few_codes][stage_dims + 2];
  int32_t winner[most_levels][few_rows];
};

// What is multiplied in one go: 64 dims of a tile of codes of a level.
struct Stage {
  int level, tile, first_dim;
};

// The next stage of a block that has work, or level == count.
VQK_DEVICE Stage next_stage(const Levels &levels, const Few &f, int rank, Stage stage) {
  stage.first_dim += stage_dims;
  if (stage.first_dim < f.dim) return stage;
  stage.first_dim = 0;
  stage.tile += f.group;
  while (stage.level < levels.count && stage.tile * few_codes >= levels.level[stage.level].num_codes) {
    ++stage.level;
    stage.tile = rank;
  }
  return stage;
}

constexpr int stage_loads = few_codes * stage_dims / few_threads;

// Each thread's share: one dim of every second code. What is asked of every element costs as much as the arithmetic, so the
// dtype is asked for once.
VQK_DEVICE void fetch(const Levels &levels, const Few &f, int64_t head, const Stage &stage, float (&part)[stage_loads]) {
  const Level &level = levels.level[stage.level];
  constexpr int step = few_threads / stage_dims;
  const int d = stage.first_dim + static_cast<int>(threadIdx.x) % stage_dims;
  const int first = stage.tile * few_codes + static_cast<int>(threadIdx.x) / stage_dims;
  const int count = d < f.dim ? level.num_codes - first : 0;
  const int64_t start = head * level.head + first * level.code + d * level.dim, pitch = step * level.code;
  if (level.dtype == VQK_F32) {
    const float *from = static_cast<const float *>(level.data) + start;
#pragma unroll
    for (int i = 0; i < stage_loads; ++i) part[i] = i * step < count ? from[i * pitch] : 0.0f;
  } else {
    const uint16_t *from = static_cast<const uint16_t *>(level.data) + start;
    const bool half = level.dtype == VQK_F16;
#pragma unroll
    for (int i = 0; i < stage_loads; ++i) {
      const uint16_t bits = i * step < count ? from[i * pitch] : uint16_t{0};
      part[i] = half ? half_to_float(bits) : bf16_to_float(bits);
    }
  }
}

// Dims [0, count), in ascending order, nothing fused. Dims are padded to an even number by zeros on both sides: adding their
// square, +0, to a sum of squares changes no bit.
template <int n>
VQK_DEVICE void add_squares(double (&total)[4], const double *code, const double *const (&row)[4], int count) {
#pragma unroll 4
  for (int d = 0; d < count; d += 2) {
    const double2 e = *reinterpret_cast<const double2 *>(code + d);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const double2 a = *reinterpret_cast<const double2 *>(row[i] + d);
      const double x = __dsub_rn(a.x, e.x), y = __dsub_rn(a.y, e.y);
      total[i] = __dadd_rn(__dadd_rn(total[i], __dmul_rn(x, x)), __dmul_rn(y, y));
    }
  }
}

// Grid: heads * tiles * group, all resident.
template <int dims>
__global__ void __launch_bounds__(few_threads) search_few(const __grid_constant__ Levels levels, const __grid_constant__ Few f) {
  start_kernel();
  FewShared<dims> &shared = shared_memory<FewShared<dims>>();
  const int tile = static_cast<int>(blockIdx.x) / f.group, rank = static_cast<int>(blockIdx.x) % f.group;
  const int64_t head = tile / f.tiles, first_row = static_cast<int64_t>(tile % f.tiles) * f.tile_rows;
  const int rows = min(f.tile_rows, static_cast<int>(f.rows - first_row));
  // Rows w, w + 4, ... of the tile are warp w's alone, to score, to merge and to update.
  const int own = (rows - warp() + few_warps - 1) / few_warps;
  const double *row[4];
  for (int i = 0; i < 4; ++i) {
    double *to = shared.row[warp() + few_warps * i];
    row[i] = to;
    if (i >= own) continue;
    const int64_t start = row_start(f.x, head, first_row + warp() + few_warps * i);
    for (int d = lane(); d < dims; d += 32)
      to[d] = d < f.dim ? load<float>(f.x.data, f.x.dtype, start + d * f.x.stride[3]) : 0.0f;
  }
  float part[stage_loads];
  Stage stage = next_stage(levels, f, rank, {0, rank - f.group, f.dim});
  if (stage.level < levels.count) fetch(levels, f, head, stage, part);
  for (int q = 0; q < levels.count; ++q) {
    double best[4], total[4];
    int winner[4];
    for (int i = 0; i < 4; ++i) {
      best[i] = INFINITY;
      winner[i] = INT32_MAX;
    }
    while (stage.level == q) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < stage_loads; ++i)
        shared.code[threadIdx.x / stage_dims + i * (few_threads / stage_dims)][threadIdx.x % stage_dims] = part[i];
      __syncthreads();
      const Stage following = next_stage(levels, f, rank, stage);
      if (following.level < levels.count) fetch(levels, f, head, following, part);
      if (stage.first_dim == 0)
        for (int i = 0; i < 4; ++i) total[i] = 0;
      const double *const from[4] = {row[0] + stage.first_dim, row[1] + stage.first_dim, row[2] + stage.first_dim,
                                     row[3] + stage.first_dim};
      const int count = min(stage_dims, (f.dim - stage.first_dim + 1) / 2 * 2);
      if (own == 1)
        add_squares<1>(total, shared.code[lane()], from, count);
      else if (own == 2)
        add_squares<2>(total, shared.code[lane()], from, count);
      else if (own > 2)
        add_squares<4>(total, shared.code[lane()], from, count);
      const int code = stage.tile * few_codes + lane();
      if (stage.first_dim + stage_dims >= f.dim && code < levels.level[q].num_codes)
        for (int i = 0; i < 4; ++i)
          if (total[i] < best[i]) {  // NaN and infinity do not
            best[i] = total[i];
            winner[i] = code;
          }
      stage = following;
    }
    // Two buffers: a block may be a level ahead of one that still reads, never two.
    const int64_t found = (static_cast<int64_t>(q % 2) * gridDim.x / f.group + tile) * few_rows * f.group;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= own) break;
      best_of_warp(best[i], winner[i]);
      const int64_t at = found + static_cast<int64_t>(warp() + few_warps * i) * f.group + rank;
      if (lane() == 0) {
        f.found_value[at] = best[i];
        f.found_code[at] = winner[i];
      }
    }
    grid_barrier();
    for (int i = 0; i < own; ++i) {
      const int r = warp() + few_warps * i;
      const volatile double *values = f.found_value + found + static_cast<int64_t>(r) * f.group;
      const volatile int32_t *codes = f.found_code + found + static_cast<int64_t>(r) * f.group;
      double least = INFINITY;
      int code = INT32_MAX;
      for (int g = lane(); g < f.group; g += 32) {
        const double value = values[g];
        const int at = codes[g];
        if (beats(value, at, least, code)) {
          least = value;
          code = at;
        }
      }
      best_of_warp(least, code);
      const bool none = !(least < INFINITY);
      if (none) code = 0;
      double *to = shared.row[r];
      if (rank == 0 && lane() == 0) {
        if (none) {  // nothing can win: code 0, and what its distance is
          least = 0;
          for (int d = 0; d < f.dim; ++d) {
            const double difference = __dsub_rn(to[d], load_code(levels.level[q], head, 0, d));
            least = __dadd_rn(least, __dmul_rn(difference, difference));
          }
        }
        const int64_t n = (static_cast<int64_t>(q) * f.x.size[0] + head) * f.rows + first_row + r;
        f.indices[n] = code;
        f.score[n] = __double2float_rn(least);
      }
      if (lane() == 0) shared.winner[q][r] = code;
      if (q + 1 == levels.count) continue;
      __syncwarp();
      for (int d = lane(); d < f.dim; d += 32)
        to[d] = __fsub_rn(static_cast<float>(to[d]), load_code(levels.level[q], head, code, d));
      __syncwarp();
    }
  }
  __syncwarp();
  // The sums, from the codes that were found: a group shares the dims.
  for (int i = 0; i < own; ++i) {
    const int r = warp() + few_warps * i;
    const int64_t start = row_start(f.values, head, first_row + r);
    for (int d = rank * 32 + lane(); d < f.dim; d += f.group * 32) {
      float sum = 0;
#pragma unroll 4
      for (int q = 0; q < levels.count; ++q) sum = __fadd_rn(sum, load_code(levels.level[q], head, shared.winner[q][r], d));
      static_cast<float *>(f.values.data)[start + d * f.values.stride[3]] = sum;
    }
  }
}

}  // namespace residual
}  // namespace vqk

#endif
