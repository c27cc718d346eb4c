// nearest on CUDA: which kernels run, what they find in the workspace, and the C ABI. Nothing here waits for the device.
#include <algorithm>

#include "cuda/nearest_finish.cuh"
#include "cuda/nearest_sm80.cuh"
#include "cuda/nearest_sm90.cuh"
#include "cuda/nearest_steps.h"
#include "cuda/runtime.cuh"

namespace vqk {
namespace nearest {
namespace {

constexpr int64_t most_rows = int64_t{1} << 30;

int blocks_of(int64_t a, int64_t b) { return static_cast<int>(ceil_div(a, b)); }

// Dims of the contraction are padded to what the kernels come in.
Layout layout_of(int dim, int kernel) {
  const bool split = dim <= split_dims;
  const int dims = split ? 3 * dim : dim;
  if (dims <= 32) {
    const int width = dims <= 16 ? 16 : 32;
    return {width, 1, split, dims + bias_dims <= width};
  }
  if (dims > 64 && dims <= 96) return {32, 3, split, false};
  const int panels = blocks_of(dims, 64);
  if (kernel == VQK_SCREEN_SM90 && panels > 4) return {64, panels <= 6 ? 6 : 8, split, false};
  return {64, panels, split, false};
}

}  // namespace

int32_t check(const vqk_rows *x, const vqk_codes *e, int32_t metric, const vqk_cuda_search_plan *plan) {
  if (x->dtype == VQK_F64 || e->dtype == VQK_F64) return fail(VQK_UNSUPPORTED, "nearest: float64 is not searched on CUDA");
  if (x->size[0] != e->size[0] || x->size[3] != e->size[2] || e->size[1] < 1 || e->size[2] < 1)
    return fail(VQK_INVALID, "nearest: sizes of x and codebook do not agree");
  if (metric < VQK_L2 || metric > VQK_DOT) return fail(VQK_INVALID, "nearest: metric %d", metric);
  if (e->size[1] >= most_rows || x->size[0] > 65535 || e->size[2] > (1 << 20) ||
      x->size[1] * x->size[2] * x->size[0] > INT64_MAX / 64)
    return fail(VQK_UNSUPPORTED, "nearest: sizes beyond 32-bit ids");
  const int64_t heads = x->size[0];
  if (plan->screen < VQK_SCREEN_NONE || plan->screen > VQK_SCREEN_SM90 || plan->multiprocessors < 1 || plan->splits < 1 ||
      plan->shared < 99 * 1024)
    return fail(VQK_INVALID, "nearest: no such plan");
  if (plan->screen != VQK_SCREEN_NONE && (plan->chunk_rows < 1 || plan->chunk_rows * heads >= most_rows))
    return fail(VQK_INVALID, "nearest: chunks of %lld rows", static_cast<long long>(plan->chunk_rows));
  if (plan->screen == VQK_SCREEN_SM90 && e->size[2] > 512)
    return fail(VQK_INVALID, "nearest: the sm_90a screen takes 512 dims at most");
  return VQK_OK;
}

void prepare(const vqk_rows *x, const vqk_codes *e, int32_t metric, int32_t precision, const vqk_cuda_search_plan *plan,
             Search *s) {
  *s = Search();
  s->x = x->data;
  s->e = e->data;
  s->x_head = x->stride[0], s->x_batch = x->stride[1], s->x_row = x->stride[2], s->x_dim = x->stride[3];
  s->e_head = e->stride[0], s->e_code = e->stride[1], s->e_dim = e->stride[2];
  s->x_dtype = x->dtype, s->e_dtype = e->dtype, s->metric = metric;
  s->heads = static_cast<int32_t>(x->size[0]);
  s->num_rows = x->size[1] * x->size[2];
  s->inner = std::max<int64_t>(x->size[2], 1);
  s->num_codes = static_cast<int32_t>(e->size[1]);
  s->dim = static_cast<int32_t>(e->size[2]);
  if (plan->screen == VQK_SCREEN_NONE) {
    s->direct = 1;
    const int64_t rows = std::max<int64_t>(1, s->heads * s->num_rows);
    s->slices = std::max<int>(1, std::min<int>(blocks_of(s->num_codes, 32), blocks_of(4 * plan->multiprocessors, rows)));
    if (rows > most_sliced) s->slices = 1;
    return;
  }
  const bool hopper = plan->screen == VQK_SCREEN_SM90;
  s->layout = layout_of(s->dim, plan->screen);
  const int dims = s->layout.width * s->layout.panels;
  s->tiles = blocks_of(s->num_codes, tile_codes);
  s->tile_bytes = tile_codes * 2 * dims + trailer_bytes;
  s->splits = std::min(plan->splits, s->tiles);
  s->tiles_per_split = blocks_of(s->tiles, s->splits);
  s->splits = blocks_of(s->tiles, s->tiles_per_split);
  s->lists = s->splits * (hopper ? 4 : 8);
  s->span = dims > 32 ? 8 : hopper ? 32 : 16;
  s->keep = precision == VQK_EXACT ? 1.0f : 0.0f;
  // Twice the bound of a float16 product on tensor cores, by the larger (Ampere's) of the published constants; more than
  // float32 sums in any order.
  s->accumulation = static_cast<float>(2.0 * (dims / 8) * (9 * 0x1p-24 + 0x1p-23) * (1 + 0x1p-20));
  s->rows_padded = blocks_of(std::min(plan->chunk_rows, std::max<int64_t>(s->num_rows, 1)), padded_rows) * padded_rows;
  s->slices = std::max(1, std::min(16, blocks_of(s->num_codes, 4096)));
}

// A part of the workspace for each pointer that it is called with.
struct Taker {
  Workspace &space;
  template <class T>
  void operator()(T *&part, int64_t count) const {
    part = space.take<T>(count);
  }
};

void take_codes(Search *s, Workspace &space) {
  if (s->direct) return;
  const Taker take{space};
  const int64_t heads = s->heads;
  take(s->centre, heads * s->dim);
  take(s->head_state, 2 * heads);
  take(s->largest, heads * s->num_codes);
  if (s->metric == VQK_COSINE) take(s->norms, heads * s->num_codes);
  take(s->codes, heads * s->tiles * s->tile_bytes);
}

void take_rows(Search *s, Workspace &space) {
  const Taker take{space};
  const int64_t heads = s->heads;
  if (s->direct) {
    const int64_t rows = heads * s->num_rows;
    take(s->ticket, rows);
    take(s->slice_value, rows * s->slices);
    take(s->slice_code, rows * s->slices);
    return;
  }
  const int64_t rows = heads * s->rows_padded;
  take(s->packed, rows * 2 * s->layout.width * s->layout.panels);
  take(s->info, rows * 5);
  take(s->part, rows * s->lists);
  take(s->threshold, rows);
  take(s->listed, rows * capacity);
  take(s->count, rows);
  take(s->wide, rows);
  take(s->scan, rows);
  take(s->counters, heads + 1);
  take(s->ticket, most_sliced);
  take(s->slice_value, static_cast<int64_t>(most_sliced) * s->slices);
  take(s->slice_code, static_cast<int64_t>(most_sliced) * s->slices);
}

namespace {

// Launches until one fails.
struct Run {
  void *stream;
  int32_t status = VQK_OK;

  template <class... Parameters, class... Arguments>
  void operator()(const char *what, void (*kernel)(Parameters...), int64_t blocks, int64_t rows, int threads, size_t shared,
                  const Arguments &...arguments) {
    if (status != VQK_OK) return;
    status = launch(
        what, kernel,
        {dim3(static_cast<uint32_t>(blocks), static_cast<uint32_t>(rows)), dim3(static_cast<uint32_t>(threads)), shared, stream},
        arguments...);
  }
};

template <int width, int resident, int span>
void run_screen80(Run &run, const Search &s, size_t limit) {
  if constexpr (resident > 1 && width == 64)
    if (sizeof(Shared80<width, resident>) > limit) return run_screen80<width, 0, span>(run, s, limit);
  run("nearest: screen (sm_80)", screen80<width, resident, span>,
      static_cast<int64_t>(blocks_of(s.rows, block_rows80)) * s.splits, s.heads, threads80, sizeof(Shared80<width, resident>), s);
}

void screen_by_warps(Run &run, const Search &s, size_t limit) {
  switch (s.layout.width * s.layout.panels) {
    case 16: return run_screen80<16, 1, 16>(run, s, limit);
    case 32: return run_screen80<32, 1, 16>(run, s, limit);
    case 64: return run_screen80<64, 1, 8>(run, s, limit);
    case 96: return run_screen80<32, 3, 8>(run, s, limit);
    case 128: return run_screen80<64, 2, 8>(run, s, limit);
    case 192: return run_screen80<64, 3, 8>(run, s, limit);
    case 256: return run_screen80<64, 4, 8>(run, s, limit);
    default: return run_screen80<64, 0, 8>(run, s, limit);
  }
}

template <int width, int panels, int halves, int span, bool folded = false>
void run_screen90(Run &run, const Search &s, int multiprocessors) {
  const int64_t items = static_cast<int64_t>(blocks_of(s.rows, 128 * halves)) * s.splits * s.heads;
  run("nearest: screen (sm_90a)", screen90<width, panels, halves, span, folded>, std::min<int64_t>(items, multiprocessors), 1,
      threads90, sizeof(Shared90<width, panels, halves>), s);
}

void screen_by_groups(Run &run, const Search &s, int multiprocessors) {
  switch (s.layout.width * s.layout.panels) {
    case 16:
      return s.layout.folded ? run_screen90<16, 1, 2, 32, true>(run, s, multiprocessors)
                             : run_screen90<16, 1, 2, 32>(run, s, multiprocessors);
    case 32:
      return s.layout.folded ? run_screen90<32, 1, 2, 32, true>(run, s, multiprocessors)
                             : run_screen90<32, 1, 2, 32>(run, s, multiprocessors);
    case 64: return run_screen90<64, 1, 2, 8>(run, s, multiprocessors);
    case 96: return run_screen90<32, 3, 2, 8>(run, s, multiprocessors);
    case 128: return run_screen90<64, 2, 2, 8>(run, s, multiprocessors);
    case 192: return run_screen90<64, 3, 2, 8>(run, s, multiprocessors);
    case 256: return run_screen90<64, 4, 2, 8>(run, s, multiprocessors);
    case 384: return run_screen90<64, 6, 1, 8>(run, s, multiprocessors);
    default: return run_screen90<64, 8, 1, 8>(run, s, multiprocessors);
  }
}

template <int width>
void run_collect_wide(Run &run, const Search &s, int multiprocessors) {
  run("nearest: collect (wide rows)", collect_wide<width>, std::max(1, blocks_of(2 * multiprocessors, s.heads)), s.heads,
      threads80, sizeof(Shared80<width, 0>), s);
}

void search_chunk(Run &run, Search s, const vqk_cuda_search_plan *plan) {
  run("nearest: pack rows", pack_rows, s.rows_padded / rows_per_block, s.heads, 256, sizeof(RowsShared), s);
  if (s.residual != nullptr) {
    s.x = s.residual;
    s.x_dtype = VQK_F32;
    s.x_dim = 1, s.x_row = s.dim, s.x_batch = s.inner * s.dim, s.x_head = s.num_rows * s.dim;
  }
  if (plan->screen == VQK_SCREEN_SM90)
    screen_by_groups(run, s, plan->multiprocessors);
  else
    screen_by_warps(run, s, static_cast<size_t>(plan->shared));
  run("nearest: collect", collect, blocks_of(s.rows, merge_rows), s.heads, merge_rows * 32, 0, s);
  if (s.layout.width == 16)
    run_collect_wide<16>(run, s, plan->multiprocessors);
  else if (s.layout.width == 32)
    run_collect_wide<32>(run, s, plan->multiprocessors);
  else
    run_collect_wide<64>(run, s, plan->multiprocessors);
  run("nearest: decide", decide, blocks_of(s.rows, 128), s.heads, 128, 0, s);
  run("nearest: scan", scan_rows, 4 * plan->multiprocessors, 1, 256, sizeof(ScanShared), s);
}

}  // namespace

int32_t pack(const Search &s, void *stream) {
  Run run{stream};
  run("nearest: centre", pack_centre, blocks_of(s.dim, 32), s.heads, 256, sizeof(CentreShared), s);
  run("nearest: code sizes", pack_stats, blocks_of(s.num_codes, 32), s.heads, 256, 0, s);
  run("nearest: pack codes", pack_codes, s.tiles, s.heads, pack_threads, sizeof(CodesShared), s);
  return run.status;
}

int32_t search(Search s, const vqk_cuda_search_plan *plan, void *stream) {
  Run run{stream};
  for (s.first_row = 0; s.first_row < s.num_rows; s.first_row += plan->chunk_rows) {
    s.rows = static_cast<int32_t>(std::min(plan->chunk_rows, s.num_rows - s.first_row));
    search_chunk(run, s, plan);
  }
  return run.status;
}

}  // namespace nearest
}  // namespace vqk

int64_t vqk_cuda_nearest_workspace(const vqk_rows *x, const vqk_codes *codebook, int32_t metric,
                                   const vqk_cuda_search_plan *plan) {
  using namespace vqk::nearest;
  if (check(x, codebook, metric, plan) != VQK_OK) return -1;
  Search s;
  vqk::Workspace space(nullptr);
  prepare(x, codebook, metric, VQK_EXACT, plan, &s);
  take_codes(&s, space);
  take_rows(&s, space);
  return space.bytes();
}

int32_t vqk_cuda_nearest(const vqk_rows *x, const vqk_codes *codebook, int32_t metric, int32_t precision,
                         const vqk_cuda_search_plan *plan, void *workspace, int64_t *indices, float *score, int32_t device,
                         void *stream) {
  using namespace vqk;
  using namespace vqk::nearest;
  if (const int32_t status = check(x, codebook, metric, plan); status != VQK_OK) return status;
  Search s;
  Workspace space(workspace);
  prepare(x, codebook, metric, precision, plan, &s);
  take_codes(&s, space);
  take_rows(&s, space);
  s.indices = indices;
  s.score = score;
  if (s.num_rows == 0 || s.heads == 0) return VQK_OK;
  const OnDevice guard(device);
  if (guard.status() != VQK_OK) return guard.status();
  if (s.direct) {
    Run run{stream};
    const int64_t rows = s.heads * s.num_rows;
    run("nearest: tickets", clear_tickets, 1, 1, 256, 0, s);
    run("nearest: scan", scan_rows, std::min<int64_t>(rows * s.slices, 8 * plan->multiprocessors), 1, 256, sizeof(ScanShared), s);
    return run.status;
  }
  if (const int32_t status = pack(s, stream); status != VQK_OK) return status;
  return search(s, plan, stream);
}
