// quantize_grad: the gradient of a quantizer's input, dz = T(grad) + c * (z - e), over any layouts. The CPU kernel's bits.
//
// 32 rows to a block, 32 dims at a time: each operand is read along what lies together in it, so that channel-first maps
// and rows cost the same. The rotation reads its rows three times: norms, projections, result.
#include "cuda/elements.cuh"

namespace vqk {
namespace {

constexpr int lanes = 16;                       // threads per row: the CPU's order of sums
constexpr int row_step = tile_threads / lanes;  // rows that are summed side by side
constexpr int rows_each = tile / row_step;

template <class V>
struct GradShared {
  int64_t index[tile];
  Tile<V> g, z, e;
};

VQK_DEVICE float root(float x) { return __fsqrt_rn(x); }
VQK_DEVICE double root(double x) { return __dsqrt_rn(x); }

template <class V, int gradient>
__global__ void __launch_bounds__(tile_threads)
    quantize_grad(vqk_rows grad, vqk_rows z, vqk_codes codebook, const int64_t *indices, const V *commitment, vqk_rows out) {
  start_kernel();
  GradShared<V> &shared = shared_memory<GradShared<V>>();
  const int64_t rows = z.size[1] * z.size[2], D = z.size[3];
  int64_t head, first_row;
  tile_of_block(rows, head, first_row);
  load_indices(shared.index, indices, head, first_row, rows, codebook.size[1]);
  __syncthreads();
  const V c = *commitment, tiny = static_cast<V>(1e-6);  // smaller norms count as this (Fifty et al. 2024, the authors' code)

  // Of the rows that this thread helps to sum: row_of(j), j < rows_each.
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const auto row_of = [&](int j) { return static_cast<int>(threadIdx.x) / lanes + j * row_step; };
  struct Rotation {
    V z_scale, e_scale, scale, along_u, along_z;
  };
  Rotation rotation[rows_each];

  if constexpr (gradient == VQK_ROTATION) {
    const int64_t whole = D - D % lanes;
    // sums[j] = three sums of terms over the dims: a lane per thread for whole groups of 16, a tree, then the rest in order.
    const auto sum_rows = [&](bool with_grad, V(&sums)[rows_each][3], const auto &terms) {
      for (int j = 0; j < rows_each; ++j)
        for (int t = 0; t < 3; ++t) sums[j][t] = 0;
      for (int64_t first = 0; first < whole; first += tile) {
        if (with_grad) load_tile(shared.g, grad, head, first_row, rows, first);
        load_tile(shared.z, z, head, first_row, rows, first);
        load_codes(shared.e, codebook, head, shared.index, first);
        __syncthreads();
        for (int j = 0; j < rows_each; ++j)
          for (int d = lane; d < tile && first + d < whole; d += lanes) {
            const int i = row_of(j);
            V term[3];
            terms(shared.g.value[i][d], shared.z.value[i][d], shared.e.value[i][d], rotation[j], term);
            for (int t = 0; t < 3; ++t) sums[j][t] += term[t];
          }
        __syncthreads();
      }
      for (int j = 0; j < rows_each; ++j)
        for (int t = 0; t < 3; ++t)
          for (int step = lanes / 2; step > 0; step /= 2) sums[j][t] += __shfl_xor_sync(~0u, sums[j][t], step);
      if (whole == D) return;
      if (with_grad) load_tile(shared.g, grad, head, first_row, rows, whole);
      load_tile(shared.z, z, head, first_row, rows, whole);
      load_codes(shared.e, codebook, head, shared.index, whole);
      __syncthreads();
      for (int j = 0; j < rows_each; ++j)
        for (int d = 0; whole + d < D; ++d) {
          const int i = row_of(j);
          V term[3];
          terms(shared.g.value[i][d], shared.z.value[i][d], shared.e.value[i][d], rotation[j], term);
          for (int t = 0; t < 3; ++t) sums[j][t] += term[t];
        }
      __syncthreads();
    };
    V sums[rows_each][3], norms[rows_each][2];
    sum_rows(false, sums, [](V, V zd, V ed, const Rotation &, V(&term)[3]) {
      term[0] = zd * zd;
      term[1] = ed * ed;
      term[2] = 0;
    });
    for (int j = 0; j < rows_each; ++j) {
      norms[j][0] = max(root(sums[j][0]), tiny);
      norms[j][1] = max(root(sums[j][1]), tiny);
      rotation[j].z_scale = 1 / norms[j][0];
      rotation[j].e_scale = 1 / norms[j][1];
    }
    // u = z^ + e^, so that w = u / |u|
    sum_rows(true, sums, [](V gd, V zd, V ed, const Rotation &r, V(&term)[3]) {
      const V e_unit = ed * r.e_scale, u = zd * r.z_scale + e_unit;
      term[0] = u * u;
      term[1] = gd * u;
      term[2] = gd * e_unit;
    });
    for (int j = 0; j < rows_each; ++j) {
      const V u_norm = max(root(sums[j][0]), tiny);
      rotation[j].scale = norms[j][1] / norms[j][0];
      rotation[j].along_u = 2 * sums[j][1] / u_norm / u_norm;
      rotation[j].along_z = 2 * sums[j][2];
    }
  }

  for (int64_t first = 0; first < D; first += tile) {
    if (gradient != VQK_NONE) load_tile(shared.g, grad, head, first_row, rows, first);
    load_tile(shared.z, z, head, first_row, rows, first);
    load_codes(shared.e, codebook, head, shared.index, first);
    __syncthreads();
    if constexpr (gradient == VQK_ROTATION) {
      for (int j = 0; j < rows_each; ++j)
        for (int d = lane; d < tile; d += lanes) {
          const int i = row_of(j);
          const Rotation &r = rotation[j];
          const V z_unit = shared.z.value[i][d] * r.z_scale, u = z_unit + shared.e.value[i][d] * r.e_scale;
          V &g = shared.g.value[i][d];
          g = r.scale * (g - r.along_u * u + r.along_z * z_unit);
        }
      __syncthreads();
    }
    each_place(out.stride[3] == 1, [&](int i, int d) {
      if (first_row + i >= rows || first + d >= D) return;
      V dz = c * (shared.z.value[i][d] - shared.e.value[i][d]);
      if (gradient != VQK_NONE) dz = shared.g.value[i][d] + dz;
      const int64_t at = row_start(out, head, first_row + i) + (first + d) * out.stride[3];
      store<V>(out.data, out.dtype, at, shared.index[i] < 0 ? V{} : dz);
    });
    __syncthreads();
  }
}

template <class V>
int32_t start(const vqk_rows &grad, const vqk_rows &z, const vqk_codes &codebook, const int64_t *indices, const void *commitment,
              int32_t gradient, const vqk_rows &out, void *stream) {
  const Launch how{row_tiles(z.size[0], z.size[1] * z.size[2]), tile_threads, sizeof(GradShared<V>), stream};
  const V *c = static_cast<const V *>(commitment);
  switch (gradient) {
    case VQK_STRAIGHT_THROUGH:
      return launch("quantize_grad", quantize_grad<V, VQK_STRAIGHT_THROUGH>, how, grad, z, codebook, indices, c, out);
    case VQK_ROTATION: return launch("quantize_grad", quantize_grad<V, VQK_ROTATION>, how, grad, z, codebook, indices, c, out);
    default: return launch("quantize_grad", quantize_grad<V, VQK_NONE>, how, grad, z, codebook, indices, c, out);
  }
}

}  // namespace
}  // namespace vqk

int32_t vqk_cuda_quantize_grad(const vqk_rows *grad, const vqk_rows *z, const vqk_codes *codebook, const int64_t *indices,
                               const void *commitment, int32_t gradient, const vqk_rows *out, int32_t device, void *stream) {
  using namespace vqk;
  const OnDevice guard(device);
  if (guard.status() != VQK_OK) return guard.status();
  const vqk_rows inner = with_long_rows(*grad), input = with_long_rows(*z), result = with_long_rows(*out);
  const int64_t heads = input.size[0], rows = input.size[1] * input.size[2];
  if (heads * rows * input.size[3] == 0) return VQK_OK;
  if (const int32_t status = check_sizes("quantize_grad", heads, rows, codebook->size[1])) return status;
  return z->dtype == VQK_F64 ? start<double>(inner, input, *codebook, indices, commitment, gradient, result, stream)
                             : start<float>(inner, input, *codebook, indices, commitment, gradient, result, stream);
}
