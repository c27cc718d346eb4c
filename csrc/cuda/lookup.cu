// lookup: gather codes into rows of any layout and dtype, in place of gather + cast + permute.
#include <utility>

#include "cuda/elements.cuh"

namespace vqk {
namespace {

template <class V>
struct LookupShared {
  int64_t index[tile];
  Tile<V> codes;
};

// 32 rows: codes are read along their dims and written along whatever lies together in `out`.
template <class V>
__global__ void __launch_bounds__(tile_threads) lookup(vqk_codes codebook, const int64_t *indices, vqk_rows out) {
  start_kernel();
  LookupShared<V> &shared = shared_memory<LookupShared<V>>();
  const int64_t rows = out.size[1] * out.size[2];
  int64_t head, first_row;
  tile_of_block(rows, head, first_row);
  load_indices(shared.index, indices, head, first_row, rows, codebook.size[1]);
  __syncthreads();
  for (int64_t first_dim = 0; first_dim < out.size[3]; first_dim += tile) {
    load_codes(shared.codes, codebook, head, shared.index, first_dim);
    __syncthreads();
    each_place(out.stride[3] == 1, [&](int i, int d) {
      if (first_row + i >= rows || first_dim + d >= out.size[3]) return;
      const int64_t at = row_start(out, head, first_row + i) + (first_dim + d) * out.stride[3];
      store<V>(out.data, out.dtype, at, shared.codes.value[i][d]);
    });
    __syncthreads();
  }
}

// Nothing to convert or to turn: 16 bytes at a time, `units` of them per code; steps are in units too. A block has
// blockDim.y rows.
__global__ void __launch_bounds__(256)
    copy_codes(const uint4 *codes, const int64_t *indices, uint4 *out, uint32_t all_rows, uint32_t rows, int64_t num_codes,
               int64_t units, int64_t head_step, int64_t code_step) {
  start_kernel();
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= all_rows) return;
  const int64_t index = indices[row];
  const bool ok = index >= 0 && index < num_codes;
  const uint4 *code = codes + static_cast<int64_t>(row / rows) * head_step + (ok ? index : 0) * code_step;
  uint4 *to = out + row * units;
  for (int64_t unit = threadIdx.x; unit < units; unit += blockDim.x) to[unit] = ok ? code[unit] : uint4{0, 0, 0, 0};
}

bool aligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace
}  // namespace vqk

int32_t vqk_cuda_lookup(const vqk_codes *codebook, const int64_t *indices, const vqk_rows *output, int32_t device, void *stream) {
  using namespace vqk;
  const OnDevice guard(device);
  if (guard.status() != VQK_OK) return guard.status();
  const vqk_rows out = with_long_rows(*output);
  const int64_t heads = out.size[0], rows = out.size[1] * out.size[2], D = out.size[3];
  if (heads * rows * D == 0) return VQK_OK;
  if (const int32_t status = check_sizes("lookup", heads, rows, codebook->size[1])) return status;

  const int64_t per_unit = 16 / static_cast<int64_t>(dtype_size(out.dtype));
  const bool packed = out.stride[3] == 1 && out.stride[2] == D && (out.size[1] == 1 || out.stride[1] == out.size[2] * D) &&
                      (heads == 1 || out.stride[0] == rows * D);
  const bool units = D % per_unit == 0 && codebook->stride[0] % per_unit == 0 && codebook->stride[1] % per_unit == 0;
  if (packed && units && codebook->dtype == out.dtype && codebook->stride[2] == 1 && aligned(codebook->data) &&
      aligned(out.data)) {
    uint32_t width = 1;
    while (width < D / per_unit && width < 128) width *= 2;
    const dim3 block(width, 256 / width), grid(static_cast<uint32_t>(ceil_div(heads * rows, block.y)));
    return launch("lookup", copy_codes, {grid, block, 0, stream}, static_cast<const uint4 *>(codebook->data), indices,
                  static_cast<uint4 *>(out.data), static_cast<uint32_t>(heads * rows), static_cast<uint32_t>(rows),
                  codebook->size[1], D / per_unit, codebook->stride[0] / per_unit, codebook->stride[1] / per_unit);
  }
  if (codebook->dtype == VQK_F64 || out.dtype == VQK_F64)
    return launch("lookup", lookup<double>, {row_tiles(heads, rows), tile_threads, sizeof(LookupShared<double>), stream},
                  *codebook, indices, out);
  return launch("lookup", lookup<float>, {row_tiles(heads, rows), tile_threads, sizeof(LookupShared<float>), stream}, *codebook,
                indices, out);
}
