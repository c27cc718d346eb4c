// The screen for every GPU from sm_80 on: mma.sync fed by cp.async, 128 rows x 128 codes per block, 8 warps of 32 x 64.
//
// Rows stay in shared memory while codes stream through a ring of stages, or both stream (long rows, and the second
// pass over rows whose candidates may be in several places, which are gathered from a list).
#ifndef VQK_CUDA_NEAREST_SM80_CUH
#define VQK_CUDA_NEAREST_SM80_CUH

#include "cuda/nearest_epilogue.cuh"
#include "cuda/nearest_matrix.cuh"

namespace vqk {
namespace nearest {

constexpr int block_rows80 = 128, stages80 = 4, threads80 = 256;

// `resident` panels of rows stay; 0: they stream, which fits into the 99 KB that a block has on sm_86, sm_89 and sm_120.
template <int width, int resident>
struct Shared80 {
  static constexpr int pitch = 2 * width, rows_bytes = block_rows80 * pitch, codes_bytes = tile_codes * pitch;
  static constexpr int none = 16;  // bytes where there is no array
  struct Stage {
    unsigned char codes[codes_bytes], trailer[trailer_copied], rows[resident > 0 ? none : rows_bytes];
  };
  Stage stage[resident > 0 || width < 64 ? stages80 : 3];
  unsigned char rows[resident > 0 ? resident * rows_bytes : none];
};
static_assert(sizeof(Shared80<64, 0>) <= 99 * 1024 && sizeof(Shared80<64, 1>) <= 99 * 1024 &&
                  sizeof(Shared80<32, 3>) <= 99 * 1024,
              "nearest.cu asks for the limit of larger ones only");

// Streams tiles [begin, end) past the rows and hands each tile's sums to `epilogue(tile, sums, trailer)`.
// `row_at(r, panel, chunk)`: where 16 bytes of row r lie, or null.
template <int width, int resident, class RowAt, class Epilogue>
VQK_DEVICE void stream_tiles(const Search &s, int head, int begin, int end, const RowAt &row_at, const Epilogue &epilogue) {
  using Shared = Shared80<width, resident>;
  constexpr int pitch = Shared::pitch, chunks = pitch / 16, stages = sizeof(Shared::stage) / sizeof(typename Shared::Stage);
  Shared &shared = shared_memory<Shared>();
  const int panels = resident > 0 ? resident : s.layout.panels, steps = (end - begin) * panels;
  const int thread = static_cast<int>(threadIdx.x);

  const auto load_rows = [&](unsigned char *to, int panel) {
    for (int i = thread; i < block_rows80 * chunks; i += threads80) {
      const unsigned char *from = row_at(i / chunks, panel, i % chunks);
      copy_async<16>(to + swizzled(i / chunks, i % chunks * 16, pitch), from != nullptr ? from : s.packed, from != nullptr);
    }
  };
  const auto load = [&](int step) {
    if (step < steps) {
      typename Shared::Stage &stage = shared.stage[step % stages];
      const int panel = step % panels;
      const unsigned char *from = tile_start(s, head, begin + step / panels) + panel * Shared::codes_bytes;
      // After the last panel comes the tile's trailer.
      const int bytes = Shared::codes_bytes + (panel == panels - 1 ? trailer_copied : 0);
      for (int i = 16 * thread; i < bytes; i += 16 * threads80)
        copy_async<16>(i < Shared::codes_bytes ? stage.codes + i : stage.trailer + (i - Shared::codes_bytes), from + i);
      if (resident == 0) load_rows(stage.rows, panel);
    }
    copy_commit();
  };

  if constexpr (resident > 0)
    for (int panel = 0; panel < resident; ++panel) load_rows(shared.rows + panel * Shared::rows_bytes, panel);
  for (int i = 0; i < stages - 1; ++i) load(i);
  const int row0 = warp() / 2 * 32, column0 = warp() % 2 * 64;
  float sums[2][8][4];
  for (int step = 0; step < steps; ++step) {
    copy_wait<stages - 2>();
    __syncthreads();  // this stage has arrived for all, and all are done with the one that is loaded next
    load(step + stages - 1);
    const typename Shared::Stage &stage = shared.stage[step % stages];
    const int panel = step % panels;
    const unsigned char *rows = resident > 0 ? shared.rows + panel * Shared::rows_bytes : stage.rows;
    if (panel == 0)
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[i / 32][i / 4 % 8][i % 4] = 0;
#pragma unroll
    for (int k = 0; k < width / 16; ++k) {
      uint32_t a[2][4], b[4][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrices(a[m], rows + swizzled(row0 + 16 * m + lane() % 16, 32 * k + lane() / 16 * 16, pitch));
#pragma unroll
      for (int n = 0; n < 4; ++n)
        load_matrices(
            b[n], stage.codes + swizzled(column0 + 16 * n + lane() % 8 + lane() / 16 * 8, 32 * k + lane() / 8 % 2 * 16, pitch));
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n) multiply_warp(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
    if (panel == panels - 1) epilogue(begin + step / panels, sums, reinterpret_cast<const float *>(stage.trailer));
  }
  copy_wait<0>();
  __syncthreads();
}

// The row of the block that sums[m][..][2 h + ..] belong to, and the first of the thread's 16 codes in a tile.
VQK_DEVICE int row_of80(int m, int h) { return warp() / 2 * 32 + 16 * m + lane() / 4 + 8 * h; }
VQK_DEVICE int code_of80() { return lane() % 4 * 32 + warp() % 2 * 16; }

// Grid: (row blocks x splits of the codes, heads).
template <int width, int resident, int span>
__global__ void __launch_bounds__(threads80, 1) screen80(const Search s) {
  start_kernel();
  const int head = static_cast<int>(blockIdx.y), blocks = (s.rows + block_rows80 - 1) / block_rows80;
  const int first = static_cast<int>(blockIdx.x) % blocks * block_rows80, split = static_cast<int>(blockIdx.x) / blocks;
  Best best[2][2];
  RowBound row[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    best[i / 2][i % 2] = nothing_yet();
    row[i / 2][i % 2] = row_bound(s, head, first + row_of80(i / 2, i % 2));
  }
  const int begin = split * s.tiles_per_split;
  stream_tiles<width, resident>(
      s, head, begin, min(begin + s.tiles_per_split, s.tiles),
      [&](int r, int panel, int chunk) { return row_chunk(s, head, first + r, panel, chunk); },
      [&](int tile, const float (&sums)[2][8][4], const float *trailer) {
        float bias[16];
        load_bias(bias, trailer + code_of80());
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = i / 2, h = i % 2;
          keep_best<16 / span, span, false>(best[m][h], &sums[m][0][2 * h], bias, row[m][h].f,
                                            bound(row[m][h], trailer + tile_codes), (tile * tile_codes + code_of80()) / 8);
        }
      });
#pragma unroll
  for (int i = 0; i < 4; ++i)
    store_best(s, head, split * 8 + warp() % 2 * 4 + lane() % 4, first + row_of80(i / 2, i % 2), best[i / 2][i % 2]);
}

// Rows of the list of wide ones, against all codes: every code that can win is listed. Grid: (blocks, heads), persistent.
template <int width>
__global__ void __launch_bounds__(threads80, 1) collect_wide(const Search s) {
  start_kernel();
  const int head = static_cast<int>(blockIdx.y), count = s.counters[head];
  if (count == 0) return;
  const int blocks = (count + block_rows80 - 1) / block_rows80;
  const int splits = min(max(static_cast<int>(gridDim.x) / blocks, 1), s.tiles), per = (s.tiles + splits - 1) / splits;
  const int64_t base = static_cast<int64_t>(head) * s.rows_padded;
  for (int item = static_cast<int>(blockIdx.x); item < blocks * splits; item += static_cast<int>(gridDim.x)) {
    const int first = item % blocks * block_rows80, begin = item / blocks * per, end = min(begin + per, s.tiles);
    if (begin >= end) continue;
    int rows[2][2];
    RowBound row[2][2];
    float threshold[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = first + row_of80(i / 2, i % 2);
      const int r = at < count ? s.wide[base + at] : 0;
      rows[i / 2][i % 2] = r;
      row[i / 2][i % 2] = row_bound(s, head, r);
      threshold[i / 2][i % 2] = at < count ? s.threshold[base + r] : INFINITY;
    }
    stream_tiles<width, 0>(
        s, head, begin, end,
        [&](int r, int panel, int chunk) -> const unsigned char * {
          return first + r < count ? row_chunk(s, head, s.wide[base + first + r], panel, chunk) : nullptr;
        },
        [&](int tile, const float (&sums)[2][8][4], const float *trailer) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int m = i / 2, h = i % 2;
            const float eps = bound(row[m][h], trailer + tile_codes);
#pragma unroll
            for (int c = 0; c < 16; ++c) {
              const float t = __fmaf_rn(row[m][h].f, trailer[code_of80() + c], sums[m][c / 2][2 * h + c % 2]);
              if (t + eps >= threshold[m][h] && t > -INFINITY) {
                // The order within a list depends on the schedule, the winner does not.
                const int position = atomicAdd(&s.count[base + rows[m][h]], 1);
                if (position < capacity)
                  s.listed[(base + rows[m][h]) * capacity + position] = tile * tile_codes + code_of80() + c;
              }
            }
          }
        });
  }
}

}  // namespace nearest
}  // namespace vqk

#endif
