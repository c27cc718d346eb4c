// quantize_output: codes as rows, both losses and their weight: one launch for up to 32 rows, else a second adds up.
//
// Tiles of 32 rows go to blocks in turns, whose number depends on the sizes alone. A row's |z - e|^2 is given, or summed as
// the CPU kernel does it: dim d in lane d % 16, then a tree. Warp 0 has a row per lane and adds in float64: the rows of a
// lane in order, the lanes in a tree, and at the end blocks likewise.
#include "cuda/elements.cuh"

namespace vqk {
namespace {

constexpr int lanes = 16;                       // threads per row
constexpr int row_step = tile_threads / lanes;  // rows that are summed side by side
constexpr int64_t most_blocks = 1024;           // of which each leaves a partial sum

// What rows add to the loss, and how many of them count.
struct Part {
  double total;
  int32_t rows;

  VQK_DEVICE Part none() { return {0, 0}; }
  VQK_DEVICE Part both(const Part &a, const Part &b) { return {__dadd_rn(a.total, b.total), a.rows + b.rows}; }
};

// Over the 32 lanes of a warp; all of them get it.
VQK_DEVICE Part over_warp(Part part) {
  for (int step = tile / 2; step > 0; step /= 2)
    part = Part::both(part, {__shfl_xor_sync(~0u, part.total, step), __shfl_xor_sync(~0u, part.rows, step)});
  return part;
}

struct Results {
  void *codebook_loss, *commitment_loss;
  double *weight;
  int32_t dtype;  // of the losses
};

VQK_DEVICE void write_results(const Part &all, int64_t D, const Results &to) {
  const double weight = __ddiv_rn(1, max(__dmul_rn(static_cast<double>(all.rows), static_cast<double>(D)), 1.0));
  const double loss = __dmul_rn(all.total, weight);
  *to.weight = weight;
  store<double>(to.codebook_loss, to.dtype, 0, loss);
  store<double>(to.commitment_loss, to.dtype, 0, loss);
}

template <class V>
struct OutputShared {
  Part part[tile];  // of the rows that a lane of warp 0 has seen: registers are scarce
  int64_t index[tile];
  V error[tile];
  Tile<V> z, e;
};

// Rows whose codes need no conversion and no turning are copied 16 bytes at a time, `units` of them per code; 0: element by
// element. 2^log_width threads share a row then.
struct Units {
  int64_t units, head_step, code_step;
  int log_width;
};

template <class V>
VQK_DEVICE void copy_codes(const OutputShared<V> &shared, const vqk_codes &codebook, const vqk_rows &out, const Units &how,
                           int64_t head, int64_t first_row, int64_t rows) {
  const int width = 1 << how.log_width, first = static_cast<int>(threadIdx.x) & (width - 1);
  const uint4 *codes = static_cast<const uint4 *>(codebook.data) + head * how.head_step;
  uint4 *to = static_cast<uint4 *>(out.data) + (head * rows + first_row) * how.units;
  for (int i = static_cast<int>(threadIdx.x) >> how.log_width; i < tile && first_row + i < rows;
       i += tile_threads >> how.log_width) {
    const int64_t index = shared.index[i];
    const uint4 *code = codes + max(index, int64_t{0}) * how.code_step;
    for (int64_t unit = first; unit < how.units; unit += width)
      to[i * how.units + unit] = index < 0 ? uint4{0, 0, 0, 0} : code[unit];
  }
}

template <class V, bool measured>
__global__ void __launch_bounds__(tile_threads)
    quantize_output(vqk_rows z, vqk_codes codebook, const int64_t *indices, const float *distance, vqk_rows out, Units how,
                    Part *parts, Results results) {
  start_kernel();
  OutputShared<V> &shared = shared_memory<OutputShared<V>>();
  const int64_t rows = out.size[1] * out.size[2], D = out.size[3];
  const uint32_t per_head = static_cast<uint32_t>((rows + tile - 1) / tile);
  const uint32_t tiles = static_cast<uint32_t>(out.size[0]) * per_head;
  const int lane = static_cast<int>(threadIdx.x) % lanes, row = static_cast<int>(threadIdx.x) / lanes;
  if (threadIdx.x < tile) shared.part[threadIdx.x] = Part::none();
  for (uint32_t number = blockIdx.x; number < tiles; number += gridDim.x) {
    const int64_t head = number / per_head, first_row = static_cast<int64_t>(number % per_head) * tile;
    load_indices(shared.index, indices, head, first_row, rows, codebook.size[1]);
    __syncthreads();
    if (measured && how.units > 0) {
      copy_codes(shared, codebook, out, how, head, first_row, rows);
    } else {
      V sums[tile / row_step] = {};
      for (int64_t first = 0; first < D; first += tile) {
        if (!measured) load_tile(shared.z, z, head, first_row, rows, first);
        load_codes(shared.e, codebook, head, shared.index, first);
        __syncthreads();
        if (!measured)
          for (int j = 0; j < tile / row_step; ++j)
            for (int d = lane; d < tile; d += lanes) {
              const V error = shared.z.value[row + j * row_step][d] - shared.e.value[row + j * row_step][d];
              sums[j] += error * error;
            }
        each_place(out.stride[3] == 1, [&](int i, int d) {
          if (first_row + i >= rows || first + d >= D) return;
          const int64_t at = row_start(out, head, first_row + i) + (first + d) * out.stride[3];
          store<V>(out.data, out.dtype, at, shared.e.value[i][d]);
        });
        __syncthreads();
      }
      if (!measured) {
        for (int j = 0; j < tile / row_step; ++j) {
          for (int step = lanes / 2; step > 0; step /= 2) sums[j] += __shfl_xor_sync(~0u, sums[j], step);
          if (lane == 0) shared.error[row + j * row_step] = sums[j];
        }
        __syncthreads();
      }
    }
    if (threadIdx.x < tile && shared.index[threadIdx.x] >= 0) {
      double error;
      if (measured)
        error = distance[head * rows + first_row + threadIdx.x];
      else
        error = shared.error[threadIdx.x];
      shared.part[threadIdx.x] = Part::both(shared.part[threadIdx.x], {error, 1});
    }
    __syncthreads();  // before the next tile's indices
  }
  if (threadIdx.x >= tile) return;
  const Part part = over_warp(shared.part[threadIdx.x]);
  if (threadIdx.x > 0) return;
  if (gridDim.x == 1)
    write_results(part, D, results);
  else
    parts[blockIdx.x] = part;
}

struct FinishShared {
  Part warp[tile_threads / 32];
};

// All parts by one block: those of a thread in order, then threads in a tree.
__global__ void __launch_bounds__(tile_threads) finish_output(const Part *parts, int64_t count, int64_t D, Results results) {
  start_kernel();
  FinishShared &shared = shared_memory<FinishShared>();
  Part part = Part::none();
  for (int64_t i = threadIdx.x; i < count; i += tile_threads) part = Part::both(part, parts[i]);
  part = over_warp(part);
  if (lane() == 0) shared.warp[warp()] = part;
  __syncthreads();
  if (threadIdx.x > 0) return;
  part = shared.warp[0];
  for (int i = 1; i < tile_threads / 32; ++i) part = Part::both(part, shared.warp[i]);
  write_results(part, D, results);
}

int64_t blocks_of(const vqk_rows &out) { return std::min(out.size[0] * ceil_div(out.size[1] * out.size[2], tile), most_blocks); }

bool aligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

Units units_of(const vqk_codes &codebook, const vqk_rows &out) {
  const int64_t D = out.size[3], each = 16 / static_cast<int64_t>(dtype_size(out.dtype));
  const bool packed = out.stride[3] == 1 && out.stride[2] == D && (out.size[1] == 1 || out.stride[1] == out.size[2] * D) &&
                      (out.size[0] == 1 || out.stride[0] == out.size[1] * out.size[2] * D);
  const bool whole = D % each == 0 && codebook.stride[0] % each == 0 && codebook.stride[1] % each == 0;
  if (!packed || !whole || codebook.dtype != out.dtype || codebook.stride[2] != 1 || !aligned(codebook.data) ||
      !aligned(out.data))
    return {};
  Units how{D / each, codebook.stride[0] / each, codebook.stride[1] / each, 0};
  while (1 << how.log_width < how.units && how.log_width < 7) ++how.log_width;
  return how;
}

template <class V>
int32_t run(const vqk_rows &z, const vqk_codes &codebook, const int64_t *indices, const float *distance, const vqk_rows &out,
            Part *parts, const Results &results, void *stream) {
  const int64_t blocks = blocks_of(out);
  const Launch how{dim3(static_cast<uint32_t>(blocks)), tile_threads, sizeof(OutputShared<V>), stream};
  const int32_t status = distance == nullptr ? launch("quantize_output", quantize_output<V, false>, how, z, codebook, indices,
                                                      distance, out, Units{}, parts, results)
                                             : launch("quantize_output", quantize_output<V, true>, how, z, codebook, indices,
                                                      distance, out, units_of(codebook, out), parts, results);
  if (status != VQK_OK || blocks == 1) return status;
  return launch("quantize_output", finish_output, {1, tile_threads, sizeof(FinishShared), stream}, parts, blocks, out.size[3],
                results);
}

}  // namespace
}  // namespace vqk

int64_t vqk_cuda_quantize_output_workspace(const vqk_rows *out) {
  const int64_t blocks = vqk::blocks_of(vqk::with_long_rows(*out));
  return blocks == 1 ? 0 : blocks * static_cast<int64_t>(sizeof(vqk::Part));
}

int32_t vqk_cuda_quantize_output(const vqk_rows *z, const vqk_codes *codebook, const int64_t *indices, const float *distance,
                                 const vqk_rows *out, void *codebook_loss, void *commitment_loss, double *weight, void *workspace,
                                 int32_t device, void *stream) {
  using namespace vqk;
  const OnDevice guard(device);
  if (guard.status() != VQK_OK) return guard.status();
  const vqk_rows rows = z == nullptr ? vqk_rows{} : with_long_rows(*z), result = with_long_rows(*out);
  if (const int32_t status = check_sizes("quantize_output", result.size[0], result.size[1] * result.size[2], codebook->size[1]))
    return status;
  Part *parts = static_cast<Part *>(workspace);
  if (out->dtype == VQK_F64)
    return run<double>(rows, *codebook, indices, distance, result, parts, {codebook_loss, commitment_loss, weight, VQK_F64},
                       stream);
  return run<float>(rows, *codebook, indices, distance, result, parts, {codebook_loss, commitment_loss, weight, VQK_F32}, stream);
}
