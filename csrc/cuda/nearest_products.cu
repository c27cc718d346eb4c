// The screens' building blocks by themselves: one tile of codes times 128 rows, every sum written out, nothing searched.
//
// vqkernels/_cuda_selftest.py asks each GPU with it, before the first search, whether products and their sums are what
// the screens take them for; benchmarks/gpu_blocks.py finds out which block is to blame where they are not.
#include "cuda/nearest_sm80.cuh"
#include "cuda/runtime.cuh"

namespace vqk {
namespace nearest {
namespace {

constexpr int products_rows = 2 * row_block;

struct Products {
  const unsigned char *rows, *codes;  // packed as nearest_pack.cuh packs them
  float *sums;                        // (128, 128): rows, columns
  unsigned char *copied;              // what arrived in shared memory, or null
  int32_t *late;                      // becomes 1 if it did not arrive
  uint64_t bits;                      // of both descriptors but for the address; 0: descriptor()'s
  int32_t advance, panels;            // 16 bytes to the next 16 dims; 0: 2
};

template <int width, int panels>
struct SharedProducts {
  unsigned char rows[panels * row_block * 2 * width], codes[panels * tile_codes * 2 * width];
  unsigned char beyond[18 * 1024];  // what other descriptors than the screen's may reach
  Mbarrier full;
};

// One warp group and 64 rows per block; the copies, descriptors, products and fragments of screen90, without its ring.
template <int width, int panels>
__global__ void __launch_bounds__(128) products90(const Products p) {
  start_kernel();
#if defined(__CUDACC__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // never launched there
#else
  using Shared = SharedProducts<width, panels>;
  Shared &shared = shared_memory<Shared>();
  constexpr int pitch = 2 * width;
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shared.full.init(1);
  fence_mbarrier_init();
  __syncthreads();
  if (thread == 0) {
    shared.full.arrive_expect(sizeof shared.rows + sizeof shared.codes);
    bulk_copy(shared.rows, p.rows + block * static_cast<int>(sizeof shared.rows), sizeof shared.rows, shared.full);
    bulk_copy(shared.codes, p.codes, sizeof shared.codes, shared.full);
  }
  if (!shared.full.wait_briefly(0)) {
    *p.late = 1;
    return;
  }
  if (p.copied != nullptr)
    for (int i = thread; i < static_cast<int>(sizeof shared.codes); i += 128) {
      if (i < static_cast<int>(sizeof shared.rows)) p.copied[block * static_cast<int>(sizeof shared.rows) + i] = shared.rows[i];
      if (block == 0) p.copied[2 * static_cast<int>(sizeof shared.rows) + i] = shared.codes[i];
    }
  __syncthreads();
  const auto of = [&](const unsigned char *at) {
    const uint32_t address = shared_address(at);
    return p.bits == 0 ? descriptor(address, pitch) : p.bits | static_cast<uint64_t>(address) / 16;
  };
  float sums[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[i] = NAN;  // the first product must not add to them
  const uint64_t advance = p.advance == 0 ? 2 : static_cast<uint64_t>(p.advance);
#pragma unroll
  for (int panel = 0; panel < panels; ++panel) {
    const uint64_t a = of(shared.rows + panel * row_block * pitch), b = of(shared.codes + panel * tile_codes * pitch);
    group_begin();
#pragma unroll
    for (int k = 0; k < width / 16; ++k)
      multiply_group(sums, a + static_cast<uint64_t>(k) * advance, b + static_cast<uint64_t>(k) * advance, panel + k > 0);
    group_commit();
  }
  group_wait<0>();
  vqk::pin(sums);
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int row = block * row_block + warp() * 16 + lane() / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
    p.sums[row * tile_codes + column] = sums[i];
  }
#endif
}

// The stream of screen80, which takes any number of panels.
template <int width>
__global__ void __launch_bounds__(threads80, 1) products80(const Search s, float *sums) {
  start_kernel();
  stream_tiles<width, 0>(
      s, 0, 0, 1, [&](int r, int panel, int chunk) { return row_chunk(s, 0, r, panel, chunk); },
      [&](int, const float (&found)[2][8][4], const float *) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          const int m = i / 32, n = i / 4 % 8, h = i / 2 % 2;
          sums[row_of80(m, h) * tile_codes + warp() % 2 * 64 + 8 * n + lane() % 4 * 2 + i % 2] = found[m][n][i % 4];
        }
      });
}

template <int width>
int32_t start80(const Products &p, void *stream) {
  Search s = Search();
  s.layout = {width, p.panels, false, false};
  s.packed = const_cast<unsigned char *>(p.rows);
  s.codes = const_cast<unsigned char *>(p.codes);
  s.rows = s.rows_padded = products_rows;
  s.tiles = 1;
  s.tile_bytes = p.panels * tile_codes * 2 * width + trailer_bytes;
  return launch("nearest: products (sm_80)", products80<width>, {1, threads80, sizeof(Shared80<width, 0>), stream}, s, p.sums);
}

template <int width, int panels>
int32_t start90(const Products &p, void *stream) {
  return launch("nearest: products (sm_90a)", products90<width, panels>,
                {products_rows / row_block, 128, sizeof(SharedProducts<width, panels>), stream}, p);
}

}  // namespace
}  // namespace nearest
}  // namespace vqk

int32_t vqk_cuda_nearest_products(int32_t screen, int32_t width, int32_t panels, const void *rows, const void *codes, float *sums,
                                  void *copied, int32_t *late, uint64_t bits, int32_t advance, int32_t device, void *stream) {
  using namespace vqk;
  using namespace vqk::nearest;
  const OnDevice guard(device);
  if (guard.status() != VQK_OK) return guard.status();
  const Products p{static_cast<const unsigned char *>(rows),
                   static_cast<const unsigned char *>(codes),
                   sums,
                   static_cast<unsigned char *>(copied),
                   late,
                   bits,
                   advance,
                   panels};
  if (screen == VQK_SCREEN_SM80 && panels >= 1) {
    if (width == 16) return start80<16>(p, stream);
    if (width == 32) return start80<32>(p, stream);
    if (width == 64) return start80<64>(p, stream);
  } else if (screen == VQK_SCREEN_SM90) {
    if (width == 16 && panels == 1) return start90<16, 1>(p, stream);
    if (width == 32 && panels == 1) return start90<32, 1>(p, stream);
    if (width == 32 && panels == 3) return start90<32, 3>(p, stream);
    if (width == 64 && panels == 1) return start90<64, 1>(p, stream);
    if (width == 64 && panels == 4) return start90<64, 4>(p, stream);
    if (width == 64 && panels == 8) return start90<64, 8>(p, stream);
  }
  return fail(VQK_INVALID, "nearest: no products of screen %d with %d panels of %d dims", screen, panels, width);
}
