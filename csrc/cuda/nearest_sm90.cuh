// The screen for Hopper: one producer thread streams rows and code tiles by bulk copies, two warp groups multiply (wgmma).
//
// Each warp group owns `halves` blocks of 64 rows and two sets of sums, and works in phases (tile, half): while the
// products of one phase run, it goes through the sums of the phase before. Tiles were packed in the order of shared
// memory, so a copy is one line and needs no tensor map.
#ifndef VQK_CUDA_NEAREST_SM90_CUH
#define VQK_CUDA_NEAREST_SM90_CUH

#include "cuda/nearest_epilogue.cuh"
#include "cuda/nearest_matrix.cuh"

namespace vqk {
namespace nearest {

constexpr int threads90 = 384, trailers90 = 4, shared_limit90 = 227 * 1024;

template <int width, int panels, int halves>
struct Shared90 {
  static constexpr int pitch = 2 * width, block_bytes = row_block * pitch * panels, codes_bytes = tile_codes * pitch;
  static constexpr int rows_bytes = 2 * halves * block_bytes;
  static constexpr int fit = (shared_limit90 - rows_bytes - trailers90 * trailer_bytes - 512) / codes_bytes;
  static constexpr int stages = fit < 8 ? fit : 8;
  static constexpr int lag = panels < 2 ? panels : 2;  // batches of products under way while the next one is prepared
  static_assert(stages > (halves == 2 ? panels : lag), "what one phase holds, and one more panel");

  unsigned char rows[rows_bytes], codes[stages][codes_bytes], trailer[trailers90][trailer_bytes];
  Mbarrier rows_full, rows_empty, codes_full[stages], codes_empty[stages], trailer_full[trailers90], trailer_empty[trailers90];
};

struct Item {
  int head, first, split, begin, end;
};
template <int halves>
VQK_DEVICE Item item_at(const Search &s, int index) {
  const int blocks = (s.rows + 128 * halves - 1) / (128 * halves);
  const int block = index % blocks, rest = index / blocks, split = rest % s.splits, begin = split * s.tiles_per_split;
  return {rest / s.splits, block * 128 * halves, split, begin, min(begin + s.tiles_per_split, s.tiles)};
}
template <int halves>
VQK_DEVICE int item_count(const Search &s) {
  return (s.rows + 128 * halves - 1) / (128 * halves) * s.splits * s.heads;
}

template <int width, int panels, int halves>
VQK_DEVICE void produce(const Search &s, Shared90<width, panels, halves> &shared) {
  using Shared = Shared90<width, panels, halves>;
  int step = 0, tiles = 0, round = 0;
  for (int i = static_cast<int>(blockIdx.x); i < item_count<halves>(s); i += static_cast<int>(gridDim.x), ++round) {
    const Item item = item_at<halves>(s, i);
    if (round > 0) shared.rows_empty.wait((round - 1) % 2);
    shared.rows_full.arrive_expect(Shared::rows_bytes);
    for (int block = 0; block < 2 * halves; ++block)
      bulk_copy(shared.rows + block * Shared::block_bytes, row_chunk(s, item.head, item.first + block * row_block, 0, 0),
                Shared::block_bytes, shared.rows_full);
    for (int tile = item.begin; tile < item.end; ++tile, ++tiles) {
      const unsigned char *from = tile_start(s, item.head, tile);
      const int slot = tiles % trailers90;
      if (tiles >= trailers90) shared.trailer_empty[slot].wait((tiles / trailers90 - 1) % 2);
      shared.trailer_full[slot].arrive_expect(trailer_copied);
      bulk_copy(shared.trailer[slot], from + panels * Shared::codes_bytes, trailer_copied, shared.trailer_full[slot]);
      for (int panel = 0; panel < panels; ++panel, ++step) {
        const int stage = step % Shared::stages;
        if (step >= Shared::stages) shared.codes_empty[stage].wait((step / Shared::stages - 1) % 2);
        shared.codes_full[stage].arrive_expect(Shared::codes_bytes);
        bulk_copy(shared.codes[stage], from + panel * Shared::codes_bytes, Shared::codes_bytes, shared.codes_full[stage]);
      }
    }
  }
}

// What a thread needs of a tile besides the products: the biases of its codes (where the sums don't have them), and the bounds.
template <bool folded>
struct Trailer {
  float bias[folded ? 1 : 32], bounds[3];
};

// One warp group. `Consumer` holds what outlives a phase; sums are passed by name, because registers have no index.
template <int width, int panels, int halves, int span, bool folded>
struct Consumer {
  using Shared = Shared90<width, panels, halves>;
  const Search &s;
  Shared &shared;
  int group;           // of the block's two
  uint32_t step = 0;   // panels of all tiles before this item; unsigned, for stages are remainders
  uint32_t tiles = 0;  // tiles before this item
  int first_tile = 0;  // of this item
  RowBound row[halves][2];
  Best best[halves][2];

  __device__ __forceinline__ int row_of(int half, int h) const {
    return (group * halves + half) * row_block + warp() % 4 * 16 + lane() / 4 + 8 * h;
  }

  __device__ __forceinline__ void release(Mbarrier &barrier) {
    if (lane() == 0) barrier.arrive();
  }

  template <int half>
  __device__ __forceinline__ void release_panel(uint32_t phase, uint32_t panel) {
    if (half == halves - 1) release(shared.codes_empty[(step + phase / halves * panels + panel) % Shared::stages]);
  }

  // Starts the products of phase p, a batch per panel. On return those of phase p - 1 are done. The last phase of a tile
  // gives each panel back once its batch is done. Only the first phase of a tile waits for what it needs of it.
  template <int half>  // p % halves
  __device__ __forceinline__ void start(float (&sums)[64], uint32_t p) {
    constexpr int lag = Shared::lag;
    const uint32_t at = step + p / halves * panels;
    const uint64_t rows = descriptor(shared_address(shared.rows + (group * halves + half) * Shared::block_bytes), Shared::pitch);
#pragma unroll
    for (int panel = 0; panel < panels; ++panel) {
      const uint32_t stage = (at + panel) % Shared::stages;
      if (half == 0) shared.codes_full[stage].wait((at + panel) / Shared::stages % 2);
      const uint64_t codes = descriptor(shared_address(shared.codes[stage]), Shared::pitch);
      group_begin();
#pragma unroll
      for (int k = 0; k < width / 16; ++k)  // 32 bytes further along K, in units of 16
        multiply_group(sums, rows + static_cast<uint64_t>((panel * row_block * Shared::pitch + 32 * k) / 16),
                       codes + static_cast<uint64_t>(2 * k), panel + k > 0);
      group_commit();
      group_wait<lag>();
      if (panel >= lag)
        release_panel<half>(p, panel - lag);
      else if (p > 0)
        release_panel<halves - 1 - half>(p - 1, panels + panel - lag);
    }
  }

  // After the last phase, p.
  __device__ __forceinline__ void drain(uint32_t p) {
    group_wait<0>();
#pragma unroll
    for (int panel = panels - Shared::lag; panel < panels; ++panel) release_panel<halves - 1>(p, panel);
    release(shared.rows_empty);
  }

  template <int half>
  __device__ __forceinline__ void finish(float (&sums)[64], Trailer<folded> &trailer, uint32_t p) {
    vqk::pin(sums);
    const uint32_t tile = p / halves, slot = (tiles + tile) % trailers90;
    const int code = lane() % 4 * 32;
    if (half == 0) {  // the other half of the rows meets the same codes
      shared.trailer_full[slot].wait((tiles + tile) / trailers90 % 2);
      const float *from = reinterpret_cast<const float *>(shared.trailer[slot]);
      if constexpr (!folded) load_bias(trailer.bias, from + code);
#pragma unroll
      for (int i = 0; i < 3; ++i) trailer.bounds[i] = from[tile_codes + i];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      keep_best<32 / span, span, folded>(best[half][h], sums + 2 * h, trailer.bias, row[half][h].f,
                                         bound(row[half][h], trailer.bounds),
                                         (first_tile + static_cast<int>(tile)) * (tile_codes / 8) + code / 8);
#pragma unroll
    for (int h = 0; h < 2; ++h) pin(best[half][h]);
    if (half == 0) {
      fence_async_proxy();  // these were ordinary loads; what comes next is a copy by the async proxy
      __syncwarp();
      release(shared.trailer_empty[slot]);
    }
  }

  __device__ __forceinline__ void run() {
    constexpr int other = halves - 1;  // the half of odd phases
    float even[64], odd[64];
    Trailer<folded> trailer;
    int round = 0;
    for (int i = static_cast<int>(blockIdx.x); i < item_count<halves>(s); i += static_cast<int>(gridDim.x), ++round) {
      const Item item = item_at<halves>(s, i);
      first_tile = item.begin;
      const uint32_t phases = static_cast<uint32_t>(item.end - item.begin) * halves;
#pragma unroll
      for (int k = 0; k < 2 * halves; ++k) {
        best[k / 2][k % 2] = nothing_yet();
        row[k / 2][k % 2] = row_bound(s, item.head, item.first + row_of(k / 2, k % 2));
      }
      shared.rows_full.wait(round % 2);
      start<0>(even, 0);
      // No branch between the start of a phase and the use of the one before, or ptxas serialises the products.
      uint32_t p = 1;
      for (; p + 1 < phases; p += 2) {
        start<other>(odd, p);
        finish<0>(even, trailer, p - 1);
        start<0>(even, p + 1);
        finish<other>(odd, trailer, p);
      }
      if (p < phases) {  // always so for two halves; said to be known, ptxas serialises after all
        start<other>(odd, p);
        finish<0>(even, trailer, p - 1);
        drain(p);
        finish<other>(odd, trailer, p);
      } else {
        drain(p - 1);
        finish<0>(even, trailer, p - 1);
      }
      step += phases / halves * panels;
      tiles += phases / halves;
#pragma unroll
      for (int k = 0; k < 2 * halves; ++k)
        store_best(s, item.head, item.split * 4 + lane() % 4, item.first + row_of(k / 2, k % 2), best[k / 2][k % 2]);
    }
  }
};

// Grid: persistent, at most one block per multiprocessor.
template <int width, int panels, int halves, int span, bool folded>
__global__ void __launch_bounds__(threads90, 1) screen90(const Search s) {
  start_kernel();
#if defined(__CUDACC__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // never launched there
#else
  using Shared = Shared90<width, panels, halves>;
  Shared &shared = shared_memory<Shared>();
  if (threadIdx.x == 0) {
    constexpr int consumers = 8;  // warps
    shared.rows_full.init(1);
    shared.rows_empty.init(consumers);
    for (int i = 0; i < Shared::stages; ++i) {
      shared.codes_full[i].init(1);
      shared.codes_empty[i].init(consumers);
    }
    for (int i = 0; i < trailers90; ++i) {
      shared.trailer_full[i].init(1);
      shared.trailer_empty[i].init(consumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp() < 4) {
    give_registers<24>();
    if (threadIdx.x == 0) produce(s, shared);
  } else {
    take_registers<240>();
    // From one lane: what is the same for a warp is then known to be, and descriptors are made by the uniform unit. For these
    // widths it would spill registers.
    constexpr bool spills = width * panels == 192 || width * panels > 256;
    const int own = warp() / 4 - 1, group = spills ? own : __shfl_sync(~0u, own, 0);
    Consumer<width, panels, halves, span, folded> consumer{s, shared, group, 0, 0, 0, {}, {}};
    consumer.run();
  }
#endif
}

}  // namespace nearest
}  // namespace vqk

#endif
