// How kernels see memory: elements of any dtype and stride, rows by number, tiles that turn between the two layouts.
#ifndef VQK_CUDA_ELEMENTS_CUH
#define VQK_CUDA_ELEMENTS_CUH

#include "cuda/runtime.cuh"

namespace vqk {

// One element as float or double: a branch that all threads take alike costs less than a kernel per pair of dtypes.
template <class V>
VQK_DEVICE V load(const void *data, int32_t dtype, int64_t at) {
  switch (dtype) {
    case VQK_F32: return static_cast<V>(static_cast<const float *>(data)[at]);
    case VQK_F64: return static_cast<V>(static_cast<const double *>(data)[at]);
    case VQK_F16: return static_cast<V>(half_to_float(static_cast<const uint16_t *>(data)[at]));
    default: return static_cast<V>(bf16_to_float(static_cast<const uint16_t *>(data)[at]));
  }
}

template <class V>
VQK_DEVICE void store(void *data, int32_t dtype, int64_t at, V value) {
  switch (dtype) {
    case VQK_F32: static_cast<float *>(data)[at] = static_cast<float>(value); break;
    case VQK_F64: static_cast<double *>(data)[at] = static_cast<double>(value); break;
    case VQK_F16: static_cast<uint16_t *>(data)[at] = float_to_half(static_cast<float>(value)); break;
    default: static_cast<uint16_t *>(data)[at] = float_to_bf16(static_cast<float>(value)); break;
  }
}

// Rows of a head are numbered in 32 bits: a 64-bit division is a subroutine.
VQK_DEVICE int64_t row_start(const vqk_rows &x, int64_t head, int64_t row) {
  const uint32_t n = static_cast<uint32_t>(row), inner = static_cast<uint32_t>(x.size[2]);
  return head * x.stride[0] + static_cast<int64_t>(n / inner) * x.stride[1] + static_cast<int64_t>(n % inner) * x.stride[2];
}

// Tiles of 32 rows x 32 dims, 256 threads; the last column is padding against bank conflicts.
constexpr int tile = 32;
constexpr int tile_threads = 256;
template <class V>
struct Tile {
  V value[tile][tile + 1];
};

// Calls f(row, dim) for all 1024 places, four per thread; next-door threads are next door along the dims, or the rows.
template <class F>
VQK_DEVICE void each_place(bool along_dims, const F &f) {
  const int inner = static_cast<int>(threadIdx.x) % tile, outer = static_cast<int>(threadIdx.x) / tile;
  for (int i = outer; i < tile; i += tile_threads / tile) along_dims ? f(i, inner) : f(inner, i);
}

// Rows first_row.. and dims first_dim.. of x into a tile, zeros beyond the ends.
template <class V>
VQK_DEVICE void load_tile(Tile<V> &to, const vqk_rows &x, int64_t head, int64_t first_row, int64_t rows, int64_t first_dim) {
  each_place(x.stride[3] == 1, [&](int i, int d) {
    const bool ok = first_row + i < rows && first_dim + d < x.size[3];
    to.value[i][d] = ok ? load<V>(x.data, x.dtype, row_start(x, head, first_row + i) + (first_dim + d) * x.stride[3]) : V{};
  });
}

// The same for one code per row, zeros where there is none (-1).
template <class V>
VQK_DEVICE void load_codes(Tile<V> &to, const vqk_codes &codebook, int64_t head, const int64_t (&index)[tile],
                           int64_t first_dim) {
  each_place(true, [&](int i, int d) {
    const bool ok = index[i] >= 0 && first_dim + d < codebook.size[2];
    const int64_t at = head * codebook.stride[0] + index[i] * codebook.stride[1] + (first_dim + d) * codebook.stride[2];
    to.value[i][d] = ok ? load<V>(codebook.data, codebook.dtype, at) : V{};
  });
}

// The codes of 32 rows, -1 for rows beyond the end and for what is no code. A barrier must follow.
VQK_DEVICE void load_indices(int64_t (&to)[tile], const int64_t *indices, int64_t head, int64_t first_row, int64_t rows,
                             int64_t num_codes) {
  if (threadIdx.x >= tile) return;
  const int64_t row = first_row + threadIdx.x;
  const int64_t index = row < rows ? indices[head * rows + row] : -1;
  to[threadIdx.x] = index >= 0 && index < num_codes ? index : -1;
}

// (H, N, 1, D) is the same rows as (H, 1, N, D), without a division by 1 per row.
inline vqk_rows with_long_rows(vqk_rows rows) {
  if (rows.size[2] == 1) {
    std::swap(rows.size[1], rows.size[2]);
    std::swap(rows.stride[1], rows.stride[2]);
  }
  return rows;
}

// Blocks of a kernel with one block per tile of rows: (head, tile) in one dimension, for the others end at 65535.
inline dim3 row_tiles(int64_t heads, int64_t rows) { return dim3(static_cast<uint32_t>(heads * ceil_div(rows, tile))); }

VQK_DEVICE void tile_of_block(int64_t rows, int64_t &head, int64_t &first_row) {
  const uint32_t tiles = static_cast<uint32_t>((rows + tile - 1) / tile);
  head = blockIdx.x / tiles;
  first_row = static_cast<int64_t>(blockIdx.x % tiles) * tile;
}

// What 32 bits must number: rows of all heads, and codes of all heads.
inline int32_t check_sizes(const char *op, int64_t heads, int64_t rows, int64_t num_codes) {
  if (heads * rows < INT32_MAX && heads * num_codes < INT32_MAX - heads * rows) return VQK_OK;
  return fail(VQK_UNSUPPORTED, "%s: %lld rows and %lld codes, row and code ids are 32-bit", op,
              static_cast<long long>(heads * rows), static_cast<long long>(heads * num_codes));
}

}  // namespace vqk

#endif
