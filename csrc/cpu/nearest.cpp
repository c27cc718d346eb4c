// nearest on CPU: arguments, the packed codebook's plan, threads and scratch. The kernels are in nearest_<isa>.cpp.
#include "cpu/nearest_search.h"

#include <cmath>
#include <cstdlib>

namespace vqk {

const Kernels *kernels_for(int32_t isa, [[maybe_unused]] int64_t dim) {
  if (!vqk_cpu_has_isa(isa)) return nullptr;
  switch (isa) {
#if defined(VQK_HAVE_AVX2)
    case VQK_AVX2: return dim >= kInt16LeastDims && dim <= kInt16MostDims ? &kernels_avx2_int16 : &kernels_avx2;
#endif
#if defined(VQK_HAVE_AVX512)
    case VQK_AVX512: return &kernels_avx512;
#endif
#if defined(VQK_HAVE_AVX512BF16)
    case VQK_AVX512BF16: return &kernels_avx512bf16;
#endif
#if defined(VQK_HAVE_AMX)
    case VQK_AMX: return &kernels_amx;
#endif
#if defined(VQK_HAVE_NEON)
    case VQK_NEON: return &kernels_neon;
#endif
    default: return &kernels_scalar;
  }
}

int32_t check_codes(const vqk_codes *codebook) {
  if (codebook->size[1] < 1) return fail(VQK_INVALID, "codebook is empty");
  if (codebook->stride[2] != 1 && codebook->size[2] > 1) return fail(VQK_INVALID, "codebook rows must be contiguous");
  return VQK_OK;
}

int64_t rows_per_block(const Kernels *kernels, int64_t heads, int64_t rows) {
  const int64_t tile = kernels->row_tile, threads = num_threads();
  const int64_t share = round_up((heads * rows + threads - 1) / threads, tile), most = round_up(kernels->block_rows, tile);
  const int64_t fair = share < most ? share : most, every = round_up(rows, tile);
  return fair < every ? fair : every;
}

namespace {

// Sizes and offsets of one head, everything but the values.
PackedHead plan(const vqk_codes *codebook, const Kernels *kernels) {
  PackedHead head;
  std::memset(&head, 0, sizeof head);
  const int64_t k = codebook->size[1], d = codebook->size[2], dims = kernels->dims_per_step;
  head.num_codes = k;
  head.dim = d;
  head.steps = round_up((d + dims - 1) / dims, kernels->step_multiple);
  const int64_t blocks = (k + kCodes - 1) / kCodes;
  // Even, because AMX takes two blocks at a time.
  head.blocks_per_group = 1;
  while (round_up(blocks, 2) > kMaxGroups * head.blocks_per_group) head.blocks_per_group *= 2;
  head.blocks = round_up(blocks, head.blocks_per_group > 2 ? head.blocks_per_group : 2);
  head.groups = head.blocks / head.blocks_per_group;
  int64_t at = round_up(sizeof(PackedHead), 64);
  const auto take = [&at](int64_t bytes) {
    const int64_t start = at;
    at = round_up(at + bytes, 64);
    return start;
  };
  head.centre = take(head.steps * dims * 4);
  head.bias = take(head.blocks * kCodes * 4);
  head.factors = take(head.blocks * kCodes * 4);
  head.bounds = take(head.groups * static_cast<int64_t>(sizeof(GroupBound)));
  head.norms = take(head.blocks * kCodes * 8);
  head.codes = take(head.blocks * kCodes * head.steps * 4);
  head.bytes = at;
  return head;
}

// A code that repeats an earlier one can never win: take it out of the screen. Without this, a collapsed codebook (thousands of
// dead codes at one place) makes every row decide thousands of exact ties.
int32_t drop_duplicates(const vqk_codes *codebook, int64_t head_index, const uint64_t *keys, const Kernels *kernels,
                        PackedHead *head) {
  int64_t size = 64;
  while (size < 2 * head->num_codes) size *= 2;
  int64_t *slots = static_cast<int64_t *>(std::malloc(static_cast<size_t>(size) * sizeof(int64_t)));
  if (slots == nullptr) return fail(VQK_NO_MEMORY, "no memory to compare %lld codes", (long long)head->num_codes);
  std::memset(slots, 0xff, static_cast<size_t>(size) * sizeof(int64_t));
  const size_t row_bytes = static_cast<size_t>(head->dim) * dtype_size(codebook->dtype);
  const auto row = [&](int64_t k) {
    return offset(static_cast<const void *>(codebook->data), codebook->dtype,
                  head_index * codebook->stride[0] + code_at(head, k) * codebook->stride[1]);
  };
  constexpr int kProbes = 16;  // giving up is correct, only slower
  // By places; equal codes stand in ascending order.
  for (int64_t k = 0; k < head->num_codes; ++k) {
    uint64_t hash = keys[k] * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 29;
    for (int probe = 0; probe < kProbes; ++probe) {
      int64_t &slot = slots[(hash + static_cast<uint64_t>(probe)) & static_cast<uint64_t>(size - 1)];
      if (slot < 0) {
        slot = k;
        break;
      }
      if (keys[slot] == keys[k] && std::memcmp(row(slot), row(k), row_bytes) == 0) {
        kernels->exclude(head, k);
        break;
      }
    }
  }
  std::free(slots);
  return VQK_OK;
}

int32_t pack_head(const vqk_codes *codebook, int64_t head_index, int32_t metric, const Kernels *kernels, PackedHead *head) {
  std::memset(head_centre(head), 0, static_cast<size_t>(head->bias - head->centre));
  if (const int32_t status = choose_units(codebook, head_index, metric, head)) return status;
  if (const int32_t status = order_codes(codebook, head_index, metric, head)) return status;
  constexpr size_t kPerBlock = sizeof(GroupBound) + kCodes * sizeof(uint64_t) + sizeof(int32_t);
  GroupBound *block_bounds = static_cast<GroupBound *>(std::malloc(static_cast<size_t>(head->blocks) * kPerBlock));
  if (block_bounds == nullptr) return fail(VQK_NO_MEMORY, "no memory for the bounds of %lld codes", (long long)head->num_codes);
  uint64_t *keys = reinterpret_cast<uint64_t *>(block_bounds + head->blocks);
  int32_t *scan = reinterpret_cast<int32_t *>(keys + head->blocks * kCodes);
  parallel_for(0, head->groups, 1 + 16384 / (kCodes * head->blocks_per_group * head->dim), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * head->blocks_per_group;
    scan[first] = kernels->pack(codebook, head_index, metric, head, first, end * head->blocks_per_group, block_bounds, keys);
    for (int64_t b = first + 1; b < end * head->blocks_per_group; ++b) scan[b] = scan[first];
  });
  int32_t status = VQK_OK;
  GroupBound *bounds = head_bounds(head);
  head->reach = 0;
  for (int64_t g = 0; g < head->groups; ++g) {
    GroupBound bound = {0, 0, 0, 0};
    for (int64_t b = g * head->blocks_per_group; b < (g + 1) * head->blocks_per_group; ++b) {
      bound.reach = std::fmax(bound.reach, block_bounds[b].reach);
      bound.spread = std::fmax(bound.spread, block_bounds[b].spread);
      bound.offset = std::fmax(bound.offset, block_bounds[b].offset);
      if (scan[b] < 0) status = fail(VQK_NO_MEMORY, "no memory to pack %lld codes", (long long)head->num_codes);
      if (scan[b] > 0) head->scan = 1;
    }
    bounds[g] = bound;
    head->reach = std::fmax(head->reach, bound.reach);
  }
  if (status == VQK_OK) status = drop_duplicates(codebook, head_index, keys, kernels, head);
  std::free(block_bounds);
  return status;
}

}  // namespace

int64_t block_bytes(const vqk_rows *x, const PackedHead *head, const Kernels *kernels, int64_t rows, char *base, Block *block) {
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    char *start = base + at;
    at = round_up(at + bytes, 64);
    return start;
  };
  const int64_t lanes = kernels->lanes, d = head->dim;
  Block scratch;
  scratch.packed_rows = reinterpret_cast<uint32_t *>(take(rows * head->steps * 4));
  scratch.strip = reinterpret_cast<float *>(take(rows / lanes * (head->groups | 1) * lanes * 4));
  scratch.row_length = reinterpret_cast<float *>(take(rows * 4));
  scratch.row_residual = reinterpret_cast<float *>(take(rows * 4));
  scratch.row_offset = reinterpret_cast<float *>(take(rows * 4));
  scratch.row_factor = reinterpret_cast<float *>(take(rows * 4));
  scratch.row_scan = reinterpret_cast<uint8_t *>(take(rows));
  const bool in_place = (x->dtype == VQK_F32 || x->dtype == VQK_F64) && (x->stride[3] == 1 || d == 1);
  scratch.row_copy = take(in_place ? 0 : rows * d * (x->dtype == VQK_F64 ? 8 : 4));
  scratch.convert = reinterpret_cast<float *>(take((d + 32 + lanes * (head->steps + 16)) * 4));
  scratch.zeros = reinterpret_cast<float *>(take(d * 4));
  scratch.best_value = reinterpret_cast<double *>(take(rows * 8));
  scratch.best_index = reinterpret_cast<int64_t *>(take(rows * 8));
  scratch.code_copy = take(8 * d * 4);
  if (block != nullptr) {
    block->packed_rows = scratch.packed_rows;
    block->strip = scratch.strip;
    block->row_length = scratch.row_length;
    block->row_residual = scratch.row_residual;
    block->row_offset = scratch.row_offset;
    block->row_factor = scratch.row_factor;
    block->row_scan = scratch.row_scan;
    block->row_copy = scratch.row_copy;
    block->convert = scratch.convert;
    block->zeros = scratch.zeros;
    block->best_value = scratch.best_value;
    block->best_index = scratch.best_index;
    block->code_copy = scratch.code_copy;
    std::memset(block->zeros, 0, static_cast<size_t>(d) * 4);
  }
  return at;
}

namespace {

// Kept by each thread between calls, so that small searches don't pay for fresh pages.
struct Scratch {
  char *data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
  char *get(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      data = static_cast<char *>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 4096))));
      size = data != nullptr ? bytes : 0;
    }
    return data;
  }
};
thread_local Scratch thread_scratch;

}  // namespace

char *thread_memory(int64_t bytes) { return thread_scratch.get(bytes); }

namespace {

struct Search {
  const vqk_rows *x;
  const vqk_codes *codebook;
  const char *packed;
  const Kernels *kernels;
  int32_t metric, precision;
  int64_t *indices;
  float *score;
  int64_t rows_per_head, block_rows, blocks_per_head, head_bytes;

  const PackedHead *head(int64_t index) const { return reinterpret_cast<const PackedHead *>(packed + index * head_bytes); }

  void open(int64_t item, char *scratch, Block *block) const {
    block->head_index = item / blocks_per_head;
    block->first = item % blocks_per_head * block_rows;
    block->x = x;
    block->codebook = codebook;
    block->head = head(block->head_index);
    block->rows = rows_per_head - block->first < block_rows ? rows_per_head - block->first : block_rows;
    block->padded_rows = round_up(block->rows, kernels->row_tile);
    block->metric = metric;
    block->precision = precision;
    block->indices = indices + block->head_index * rows_per_head + block->first;
    block->score = score + block->head_index * rows_per_head + block->first;
    block_bytes(x, block->head, kernels, block_rows, scratch, block);
  }
};

// Few rows, and values that the direct kernels read in place.
bool searches_directly(const vqk_rows *x, const vqk_codes *codebook) {
  return x->dtype == VQK_F32 && codebook->dtype == VQK_F32 && (x->stride[3] == 1 || x->size[3] == 1) &&
         x->size[1] * x->size[2] <= kDirectRows;
}

int32_t search_directly(const vqk_rows *x, const vqk_codes *codebook, int32_t metric, const Kernels *kernels, int64_t *indices,
                        float *score) {
  const int64_t rows = x->size[1] * x->size[2], codes = codebook->size[1], threads = num_threads();
  // Enough work per part to be worth a thread.
  const int64_t least = 1 + (1 << 17) / (rows * codebook->size[2]), fair = (codes + threads - 1) / threads;
  const int64_t per_part = round_up(fair > least ? fair : least, kCodes), pitch = round_up(codes, kCodes),
                parts = (codes + per_part - 1) / per_part;
  const int64_t bytes = (rows * pitch + parts * kDirectRows) * static_cast<int64_t>(sizeof(float));
  float *upper = reinterpret_cast<float *>(thread_memory(bytes));
  if (upper == nullptr) return fail(VQK_NO_MEMORY, "no memory for %lld bytes of scratch", (long long)bytes);
  float *lower = upper + rows * pitch;
  for (int64_t h = 0; h < x->size[0]; ++h) {
    const Direct search = {x, codebook, h, rows, metric, pitch, upper, indices + h * rows, score + h * rows};
    parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t stop = (p + 1) * per_part < codes ? (p + 1) * per_part : codes;
        kernels->direct_screen(&search, p * per_part, stop, lower + p * kDirectRows);
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      float most = -INFINITY;
      for (int64_t p = 0; p < parts; ++p) most = lower[p * kDirectRows + r] > most ? lower[p * kDirectRows + r] : most;
      kernels->direct_finish(&search, r, most);
    }
  }
  return VQK_OK;
}

}  // namespace
}  // namespace vqk

using vqk::Block;
using vqk::Kernels;
using vqk::PackedHead;

int32_t vqk_cpu_nearest_isa(int64_t num_codes, int64_t dim) {
  const int32_t best = vqk_cpu_best_isa();
  // A tile product takes 32 dims whatever D is, and few dims leave a bf16 screen many candidates: measured crossovers.
  const bool few = best == VQK_AMX ? dim < 6 || (dim <= vqk::kSplitDims && num_codes < 2048) : dim <= 8;
  return few && (best == VQK_AVX512BF16 || best == VQK_AMX) ? static_cast<int32_t>(VQK_AVX512) : best;
}

int32_t vqk_cpu_nearest_needs_packing(const vqk_rows *x, const vqk_codes *codebook) {
  return vqk::searches_directly(x, codebook) ? 0 : 1;
}

int64_t vqk_cpu_nearest_packed_bytes(const vqk_codes *codebook, int32_t, int32_t isa) {
  const Kernels *kernels = vqk::kernels_for(isa, codebook->size[2]);
  if (kernels == nullptr || codebook->size[1] < 1) return 0;
  return codebook->size[0] * vqk::plan(codebook, kernels).bytes;
}

int32_t vqk_cpu_nearest_pack(const vqk_codes *codebook, int32_t metric, int32_t isa, void *packed) {
  const Kernels *kernels = vqk::kernels_for(isa, codebook->size[2]);
  if (kernels == nullptr) return vqk::fail(VQK_UNSUPPORTED, "instruction set %d is not available here", isa);
  if (const int32_t status = vqk::check_codes(codebook)) return status;
  const PackedHead head = vqk::plan(codebook, kernels);
  for (int64_t h = 0; h < codebook->size[0]; ++h) {
    PackedHead *target = reinterpret_cast<PackedHead *>(static_cast<char *>(packed) + h * head.bytes);
    *target = head;
    if (const int32_t status = vqk::pack_head(codebook, h, metric, kernels, target)) return status;
  }
  return VQK_OK;
}

int32_t vqk_cpu_nearest(const vqk_rows *x, const vqk_codes *codebook, int32_t metric, int32_t precision, int32_t isa,
                        const void *packed, int64_t *indices, float *score) {
  const Kernels *kernels = vqk::kernels_for(isa, codebook->size[2]);
  if (kernels == nullptr) return vqk::fail(VQK_UNSUPPORTED, "instruction set %d is not available here", isa);
  if (const int32_t status = vqk::check_codes(codebook)) return status;
  const int64_t heads = x->size[0], rows = x->size[1] * x->size[2];
  if (heads * rows == 0) return VQK_OK;
  if (packed == nullptr) {
    if (!vqk::searches_directly(x, codebook)) return vqk::fail(VQK_INVALID, "this search needs a packed codebook");
    const Kernels *direct = kernels->direct_screen != nullptr ? kernels : vqk::kernels_for(VQK_AVX512, codebook->size[2]);
    return vqk::search_directly(x, codebook, metric, direct, indices, score);
  }
  const PackedHead *first = static_cast<const PackedHead *>(packed);
  const int64_t threads = vqk::num_threads();

  vqk::Search search = {x, codebook,    static_cast<const char *>(packed), kernels, metric, precision, indices, score, rows, 0,
                        0, first->bytes};
  search.block_rows = vqk::rows_per_block(kernels, heads, rows);
  search.blocks_per_head = (rows + search.block_rows - 1) / search.block_rows;
  const int64_t items = heads * search.blocks_per_head;
  const int64_t bytes = vqk::block_bytes(x, first, kernels, search.block_rows, nullptr, nullptr);
  bool failed = false;

  if (items >= threads || first->groups < 2 * threads) {
    vqk::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      char *scratch = vqk::thread_memory(bytes);
      if (scratch == nullptr) {
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t i = begin; i < end; ++i) {
        Block block;
        search.open(i, scratch, &block);
        kernels->prepare(&block);
        kernels->screen(&block, 0, block.head->blocks);
        kernels->finish(&block);
      }
    });
  } else {  // fewer blocks than threads: split the codes of each block over the threads that are left
    char *scratch = vqk::thread_memory(bytes * items);
    if (scratch == nullptr) return vqk::fail(VQK_NO_MEMORY, "no memory for %lld bytes of scratch", (long long)(bytes * items));
    const int64_t parts = (threads + items - 1) / items, groups = first->groups, per_group = first->blocks_per_group;
    // Parts hold an even number of blocks, as the kernels expect.
    const int64_t unit = per_group == 1 ? 2 : 1, per_part = vqk::round_up((groups + parts - 1) / parts, unit);
    vqk::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Block block;
        search.open(i, scratch + i * bytes, &block);
        kernels->prepare(&block);
      }
    });
    vqk::parallel_for(0, items * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Block block;
        search.open(i / parts, scratch + i / parts * bytes, &block);
        const int64_t from = i % parts * per_part, to = from + per_part < groups ? from + per_part : groups;
        if (from < to) kernels->screen(&block, from * per_group, to * per_group);
      }
    });
    vqk::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Block block;
        search.open(i, scratch + i * bytes, &block);
        kernels->finish(&block);
      }
    });
  }
  if (failed) return vqk::fail(VQK_NO_MEMORY, "no memory for %lld bytes of scratch per thread", (long long)bytes);
  return VQK_OK;
}
