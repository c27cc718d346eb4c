// residual_nearest: the nearest codes of all levels. A few rows in one launch (residual_few.cuh); many by the screened search of
// `nearest`, whose packing takes the code of the level before off each row as it reads it.
#include <algorithm>
#include <vector>

#include "cuda/nearest_steps.h"
#include "cuda/residual_few.cuh"

namespace vqk {
namespace residual {
namespace {

// Codes of many levels as float32, side by side. Grid: (blocks of 256 elements of one level and head, heads, levels).
__global__ void __launch_bounds__(256) gather_codes(const __grid_constant__ Levels levels, int64_t dim, float *out) {
  start_kernel();
  const int q = static_cast<int>(blockIdx.z), head = static_cast<int>(blockIdx.y);
  int64_t start = 0;
  for (int i = 0; i < q; ++i) start += levels.level[i].num_codes;
  const Level &level = levels.level[q];
  const int64_t size = level.num_codes * dim, at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (at >= size) return;
  out[start * dim * gridDim.y + head * size + at] = load_code(level, head, at / dim, at % dim);
}

struct SumShared {
  int64_t index[tile];
  Tile<float> sum;
};

// 32 rows: the sums of their codes, level by level; of levels beyond the first table, on top of what is there. Codes are read
// along their dims and sums written along whatever lies together in `values`.
__global__ void __launch_bounds__(tile_threads) sum_codes(const __grid_constant__ Levels levels, const int64_t *indices,
                                                          const __grid_constant__ vqk_rows values, bool first) {
  start_kernel();
  SumShared &shared = shared_memory<SumShared>();
  const int64_t rows = values.size[1] * values.size[2], all_rows = values.size[0] * rows;
  float *out = static_cast<float *>(values.data);
  int64_t head, first_row;
  tile_of_block(rows, head, first_row);
  for (int64_t first_dim = 0; first_dim < values.size[3]; first_dim += tile) {
    if (first)
      each_place(true, [&](int i, int d) { shared.sum.value[i][d] = 0; });
    else
      load_tile(shared.sum, values, head, first_row, rows, first_dim);
    for (int q = 0; q < levels.count; ++q) {
      __syncthreads();
      load_indices(shared.index, indices + q * all_rows, head, first_row, rows, levels.level[q].num_codes);
      __syncthreads();
      each_place(true, [&](int i, int d) {
        if (shared.index[i] < 0 || first_dim + d >= values.size[3]) return;
        shared.sum.value[i][d] =
            __fadd_rn(shared.sum.value[i][d], load_code(levels.level[q], head, shared.index[i], first_dim + d));
      });
    }
    __syncthreads();
    each_place(values.stride[3] == 1, [&](int i, int d) {
      if (first_row + i >= rows || first_dim + d >= values.size[3]) return;
      out[row_start(values, head, first_row + i) + (first_dim + d) * values.stride[3]] = shared.sum.value[i][d];
    });
    __syncthreads();
  }
}

int32_t check(const vqk_rows *x, const vqk_codes *codebooks, int32_t count, const vqk_cuda_search_plan *plan) {
  if (count < 1) return fail(VQK_INVALID, "residual_nearest: %d levels", count);
  const int64_t heads = x->size[0], rows = x->size[1] * x->size[2];
  if (heads * count > 65535 || heads * rows > INT32_MAX)
    return fail(VQK_UNSUPPORTED, "residual_nearest: sizes beyond 32-bit ids");
  if (plan->screen == VQK_SCREEN_NONE && (count > most_levels || x->size[3] > most_few_dims))
    return fail(VQK_INVALID, "residual_nearest: %d levels of %lld dims without a screen, at most %d of %d", count,
                static_cast<long long>(x->size[3]), most_levels, most_few_dims);
  for (int q = 0; q < count; ++q)
    if (const int32_t status = nearest::check(x, codebooks + q, VQK_L2, plan)) return status;
  return VQK_OK;
}

int64_t most_codes(const vqk_codes *codebooks, int32_t count) {
  int64_t most = 0;
  for (int q = 0; q < count; ++q) most = std::max(most, codebooks[q].size[1]);
  return most;
}

// Rows of a tile, the most of 16, 8 and 4 that keep three quarters of the multiprocessors busy; blocks that share its codes.
void share(const vqk_rows &x, int64_t num_codes, const vqk_cuda_search_plan *plan, int64_t resident, Few *f) {
  const int64_t heads = x.size[0], rows = x.size[1] * x.size[2], code_tiles = ceil_div(num_codes, few_codes);
  f->rows = static_cast<int32_t>(rows);
  f->dim = static_cast<int32_t>(x.size[3]);
  for (f->tile_rows = few_rows; f->tile_rows > 4; f->tile_rows /= 2) {
    const int64_t tiles = heads * ceil_div(rows, f->tile_rows), more = heads * ceil_div(rows, f->tile_rows / 2);
    if (4 * tiles * code_tiles >= 3 * plan->multiprocessors || more > resident) break;
  }
  f->tiles = static_cast<int32_t>(ceil_div(rows, f->tile_rows));
  f->group = static_cast<int32_t>(std::min(code_tiles, resident / (heads * f->tiles)));
}

constexpr int most_resident = 4;  // blocks per multiprocessor, however many fit: what a block shares takes 50 KB

int64_t few_workspace(const vqk_rows *x, const vqk_codes *codebooks, int32_t count, const vqk_cuda_search_plan *plan,
                      void *memory, Few *f) {
  // Of all plans, for the occupancy is asked for later: no more blocks than can be resident, or than there are code tiles.
  const int64_t heads = x->size[0], tiles = heads * ceil_div(x->size[1] * x->size[2], 4);
  const int64_t blocks =
      std::min<int64_t>(most_resident * plan->multiprocessors, tiles * ceil_div(most_codes(codebooks, count), few_codes));
  Workspace space(memory);
  f->found_value = space.take<double>(2 * blocks * few_rows);
  f->found_code = space.take<int32_t>(2 * blocks * few_rows);
  return space.bytes();
}

template <int dims>
int32_t launch_few(const vqk_rows &x, const vqk_codes *codebooks, int32_t count, const vqk_cuda_search_plan *plan, Few f,
                   void *stream) {
  const char *what = "residual_nearest: few rows";
  int resident = 0;
  if (const int32_t status =
          resident_blocks(what, search_few<dims>, few_threads, sizeof(FewShared<dims>), plan->multiprocessors, &resident))
    return status;
  resident = std::min(resident, most_resident * plan->multiprocessors);
  share(x, most_codes(codebooks, count), plan, resident, &f);
  if (f.group < 1)
    return fail(VQK_UNSUPPORTED, "%s: %lld tiles of rows, %d blocks fit", what, static_cast<long long>(x.size[0] * f.tiles),
                resident);
  const int64_t blocks = x.size[0] * f.tiles * f.group;
  return launch(what, search_few<dims>,
                {dim3(static_cast<uint32_t>(blocks)), dim3(few_threads), sizeof(FewShared<dims>), stream, true},
                levels_of(codebooks, 0, count), f);
}

vqk_codes heads_of(const float *codes, int64_t heads, int64_t num_codes, int64_t dim) {
  return {const_cast<float *>(codes), {heads, num_codes, dim}, {num_codes * dim, dim, 1}, VQK_F32, 0};
}

// Levels of the same size that follow one another: their codes are packed as if they were heads of one codebook.
struct Alike {
  int first, levels;
  const float *codes;  // (levels, H, K, D)
  nearest::Search packed;
};

struct Many {
  float *codes;     // all levels' side by side, (H, K, D) each
  float *residual;  // (H, N, D)
  char *rows;       // what a search needs, for one level after the other
  std::vector<Alike> runs;
  int64_t bytes;
};

Many many_workspace(const vqk_rows &x, const vqk_codes *codebooks, int32_t count, const vqk_cuda_search_plan *plan,
                    void *memory) {
  const int64_t heads = x.size[0], rows = x.size[1] * x.size[2], dim = x.size[3];
  Workspace space(memory);
  Many many{};
  int64_t all_codes = 0, most = 0, start = 0;
  for (int q = 0; q < count; ++q) all_codes += codebooks[q].size[1];
  many.codes = space.take<float>(heads * all_codes * dim);
  many.residual = count > 1 ? space.take<float>(heads * rows * dim) : nullptr;
  for (int q = 0; q < count;) {
    const int64_t num_codes = codebooks[q].size[1];
    Alike alike{q, 0, many.codes + heads * start * dim, {}};
    for (; q < count && codebooks[q].size[1] == num_codes; ++q) ++alike.levels;
    start += alike.levels * num_codes;
    vqk_rows of_all = x;
    of_all.size[0] *= alike.levels;
    const vqk_codes codes = heads_of(alike.codes, of_all.size[0], num_codes, dim);
    nearest::prepare(&of_all, &codes, VQK_L2, VQK_EXACT, plan, &alike.packed);
    nearest::take_codes(&alike.packed, space);
    many.runs.push_back(alike);
    nearest::Search one;
    Workspace searching(nullptr);
    nearest::prepare(&x, codebooks + q - 1, VQK_L2, VQK_EXACT, plan, &one);
    nearest::take_rows(&one, searching);
    most = std::max(most, searching.bytes());
  }
  many.rows = space.take<char>(most);
  many.bytes = space.bytes();
  return many;
}

int32_t run_many(const vqk_rows &x, const vqk_codes *codebooks, int32_t count, const vqk_cuda_search_plan *plan, void *workspace,
                 int64_t *indices, const vqk_rows &values, float *score, void *stream) {
  const int64_t heads = x.size[0], rows = x.size[1] * x.size[2], dim = x.size[3];
  const Many many = many_workspace(x, codebooks, count, plan, workspace);
  float *gathered = many.codes;
  for (int first = 0; first < count; first += most_levels) {
    const int levels = std::min(most_levels, count - first);
    const dim3 grid(static_cast<uint32_t>(ceil_div(most_codes(codebooks + first, levels) * dim, 256)),
                    static_cast<uint32_t>(heads), static_cast<uint32_t>(levels));
    if (const int32_t status = launch("residual_nearest: gather codes", gather_codes, {grid, 256, 0, stream},
                                      levels_of(codebooks, first, levels), dim, gathered))
      return status;
    for (int q = first; q < first + levels; ++q) gathered += heads * codebooks[q].size[1] * dim;
  }
  const float *less_codes = nullptr;
  int64_t less_count = 0;
  for (const Alike &run : many.runs) {
    if (const int32_t status = nearest::pack(run.packed, stream)) return status;
    const int64_t num_codes = run.packed.num_codes;
    for (int level = 0; level < run.levels; ++level) {
      const int64_t q = run.first + level, head = level * heads;
      const float *codes = run.codes + head * num_codes * dim;
      const vqk_codes codebook = heads_of(codes, heads, num_codes, dim);
      vqk_rows from = x;
      if (q > 1) from = {many.residual, {heads, 1, rows, dim}, {rows * dim, rows * dim, dim, 1}, VQK_F32, 0};
      nearest::Search s;
      Workspace space(many.rows);
      nearest::prepare(&from, &codebook, VQK_L2, VQK_EXACT, plan, &s);
      nearest::take_rows(&s, space);
      s.centre = run.packed.centre + head * dim;
      s.head_state = run.packed.head_state + 2 * head;
      s.largest = run.packed.largest + head * num_codes;
      s.codes = run.packed.codes + head * s.tiles * s.tile_bytes;
      s.indices = indices + q * heads * rows;
      s.score = score + q * heads * rows;
      if (q > 0) {
        s.residual = many.residual;
        s.less_codes = less_codes;
        s.less_count = less_count;
        s.less_index = s.indices - heads * rows;
      }
      if (const int32_t status = nearest::search(s, plan, stream)) return status;
      less_codes = codes;
      less_count = num_codes;
    }
  }
  for (int first = 0; first < count; first += most_levels)
    if (const int32_t status =
            launch("residual_nearest: sum codes", sum_codes, {row_tiles(heads, rows), tile_threads, sizeof(SumShared), stream},
                   levels_of(codebooks, first, std::min(most_levels, count - first)), indices + first * heads * rows, values,
                   first == 0))
      return status;
  return VQK_OK;
}

}  // namespace
}  // namespace residual
}  // namespace vqk

int64_t vqk_cuda_residual_nearest_workspace(const vqk_rows *x, const vqk_codes *codebooks, int32_t levels,
                                            const vqk_cuda_search_plan *plan) {
  using namespace vqk::residual;
  if (check(x, codebooks, levels, plan) != VQK_OK) return -1;
  Few f;
  if (plan->screen == VQK_SCREEN_NONE) return few_workspace(x, codebooks, levels, plan, nullptr, &f);
  return many_workspace(*x, codebooks, levels, plan, nullptr).bytes;
}

int32_t vqk_cuda_residual_nearest(const vqk_rows *x, const vqk_codes *codebooks, int32_t levels, const vqk_cuda_search_plan *plan,
                                  void *workspace, int64_t *indices, const vqk_rows *values, float *score, int32_t device,
                                  void *stream) {
  using namespace vqk;
  using namespace vqk::residual;
  if (const int32_t status = check(x, codebooks, levels, plan)) return status;
  const OnDevice guard(device);
  if (guard.status() != VQK_OK) return guard.status();
  if (x->size[0] * x->size[1] * x->size[2] == 0) return VQK_OK;
  const vqk_rows rows = with_long_rows(*x), out = with_long_rows(*values);
  if (plan->screen != VQK_SCREEN_NONE) return run_many(rows, codebooks, levels, plan, workspace, indices, out, score, stream);
  Few f{};
  f.x = rows;
  f.values = out;
  f.indices = indices;
  f.score = score;
  few_workspace(x, codebooks, levels, plan, workspace, &f);
  if (x->size[3] <= 256) return launch_few<256>(rows, codebooks, levels, plan, f, stream);
  return launch_few<most_few_dims>(rows, codebooks, levels, plan, f, stream);
}
