// A stable radix sort of 32-bit keys with their positions, eight bits at a time, least significant first.
//
// Written here rather than taken from cub so that the same source runs on the host under the sanitizers, and because it costs
// a tenth of cub's time to compile. Only the bits that keys can have are sorted: two passes for 16384 codes.
#ifndef VQK_CUDA_SORT_CUH
#define VQK_CUDA_SORT_CUH

#include "cuda/runtime.cuh"

namespace vqk {
namespace sort {

constexpr int digits = 256;
constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr int rounds = 8;                // keys per thread
constexpr int block = threads * rounds;  // keys per block; each warp has 256 that lie together

struct Shared {
  uint32_t count[warps][digits];  // of each warp; then where the warp's keys of that digit go
  uint32_t scan[digits];
};

// counts[digit][block]
static __global__ void __launch_bounds__(threads) count_digits(const uint32_t *keys, int64_t n, int shift, uint32_t *counts) {
  start_kernel();
  Shared &shared = shared_memory<Shared>();
  shared.scan[threadIdx.x] = 0;
  __syncthreads();
  for (int i = 0; i < rounds; ++i) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * block + i * threads + threadIdx.x;
    if (at < n) atomicAdd(&shared.scan[(keys[at] >> shift) & (digits - 1)], 1u);
  }
  __syncthreads();
  counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = shared.scan[threadIdx.x];
}

// Inclusive sum over the 256 threads of a block.
VQK_DEVICE uint32_t block_scan(Shared &shared, uint32_t value) {
  shared.scan[threadIdx.x] = value;
  __syncthreads();
  for (unsigned step = 1; step < digits; step *= 2) {
    const uint32_t before = threadIdx.x >= step ? shared.scan[threadIdx.x - step] : 0;
    __syncthreads();
    shared.scan[threadIdx.x] += before;
    __syncthreads();
  }
  return shared.scan[threadIdx.x];
}

// One block per digit: counts become the number of that digit's keys in earlier blocks; totals[digit] the sum.
static __global__ void __launch_bounds__(threads) scan_blocks(uint32_t *counts, int64_t blocks, uint32_t *totals) {
  start_kernel();
  Shared &shared = shared_memory<Shared>();
  uint32_t *row = counts + blockIdx.x * blocks, carry = 0;
  for (int64_t first = 0; first < blocks; first += threads) {
    const int64_t at = first + threadIdx.x;
    const uint32_t own = at < blocks ? row[at] : 0;
    const uint32_t sum = block_scan(shared, own);
    if (at < blocks) row[at] = carry + sum - own;
    carry += shared.scan[digits - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = carry;
}

// Every key and its position to where they belong; without positions_in, a key's position is its place.
static __global__ void __launch_bounds__(threads)
    scatter(const uint32_t *keys_in, const uint32_t *positions_in, int64_t n, int shift, const uint32_t *counts,
            const uint32_t *totals, uint32_t *keys, uint32_t *positions) {
  start_kernel();
  Shared &shared = shared_memory<Shared>();
  const int warp = vqk::warp(), lane = vqk::lane();
  const uint32_t total = totals[threadIdx.x];
  const uint32_t start = block_scan(shared, total) - total + counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x];
  for (int w = 0; w < warps; ++w) shared.count[w][threadIdx.x] = 0;
  __syncthreads();

  const int64_t first = static_cast<int64_t>(blockIdx.x) * block + warp * 32 * rounds + lane;
  uint32_t key[rounds], rank[rounds];
  for (int i = 0; i < rounds; ++i) {
    const int64_t at = first + i * 32;
    const bool ok = at < n;
    key[i] = ok ? keys_in[at] : 0;
    const uint32_t digit = (key[i] >> shift) & (digits - 1);
    // Lanes past the end count as a digit of their own.
    const uint32_t same = __match_any_sync(~0u, ok ? digit : uint32_t{digits});
    const uint32_t before = ok ? shared.count[warp][digit] : 0;
    rank[i] = before + static_cast<uint32_t>(__popc(same & ((1u << lane) - 1)));
    __syncwarp();
    if (ok && (same & ((1u << lane) - 1)) == 0) shared.count[warp][digit] = before + static_cast<uint32_t>(__popc(same));
    __syncwarp();
  }
  __syncthreads();
  uint32_t next = start;
  for (int w = 0; w < warps; ++w) {
    const uint32_t count = shared.count[w][threadIdx.x];
    shared.count[w][threadIdx.x] = next;
    next += count;
  }
  __syncthreads();
  for (int i = 0; i < rounds; ++i) {
    const int64_t at = first + i * 32;
    if (at >= n) continue;
    const uint32_t to = shared.count[warp][(key[i] >> shift) & (digits - 1)] + rank[i];
    keys[to] = key[i];
    positions[to] = positions_in == nullptr ? static_cast<uint32_t>(at) : positions_in[at];
  }
}

struct Buffers {
  uint32_t *keys[2], *positions[2];  // keys[0] holds what is to be sorted
  uint32_t *counts, *totals;

  Buffers(Workspace &workspace, int64_t n) {
    for (int i = 0; i < 2; ++i) {
      keys[i] = workspace.take<uint32_t>(n);
      positions[i] = workspace.take<uint32_t>(n);
    }
    counts = workspace.take<uint32_t>(digits * ceil_div(n, block));
    totals = workspace.take<uint32_t>(digits);
  }
};

// Sorts n keys below `limit`; the result is in keys[side], positions[side].
inline int32_t sort(const Buffers &buffers, int64_t n, uint64_t limit, void *stream, int &side) {
  const uint32_t blocks = static_cast<uint32_t>(ceil_div(n, block));
  side = 0;
  // At least one pass: it writes the positions.
  for (int shift = 0; shift == 0 || ((limit - 1) >> shift) > 0; shift += 8, side ^= 1) {
    int32_t status =
        launch("sort", count_digits, {blocks, threads, sizeof(Shared), stream}, buffers.keys[side], n, shift, buffers.counts);
    if (status == VQK_OK)
      status =
          launch("sort", scan_blocks, {digits, threads, sizeof(Shared), stream}, buffers.counts, int64_t{blocks}, buffers.totals);
    if (status == VQK_OK)
      status = launch("sort", scatter, {blocks, threads, sizeof(Shared), stream}, buffers.keys[side],
                      shift == 0 ? static_cast<uint32_t *>(nullptr) : buffers.positions[side], n, shift, buffers.counts,
                      buffers.totals, buffers.keys[side ^ 1], buffers.positions[side ^ 1]);
    if (status != VQK_OK) return status;
  }
  return VQK_OK;
}

}  // namespace sort
}  // namespace vqk

#endif
