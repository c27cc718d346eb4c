// codebook_sum: per code, the sum of its rows in an order that depends on the data alone. The CPU kernel's bits.
//
// Rows are sorted by code; every chunk of 256 rows of a code is summed by one thread per dim, then the chunks in order. The
// first chunk of a code goes straight to its sum. A later one starts at least 256 rows after its code does, and no two of
// them start within the same 256 sorted rows: start / 256 is a free place for its sum, and tells who computes it. So
// no list of chunks is ever made, and one code that owns 90 % of the rows is spread over the whole GPU.
#include "cuda/elements.cuh"
#include "cuda/sort.cuh"

namespace vqk {
namespace {

constexpr int chunk_rows = 256;  // CHUNK in ops/codebook_sum

// Head and code as one number; `nowhere`, the largest, for rows without a code.
__global__ void __launch_bounds__(256)
    make_keys(const int64_t *indices, int64_t all_rows, uint32_t rows, int64_t num_codes, uint32_t nowhere, uint32_t *keys) {
  start_kernel();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (n >= all_rows) return;
  const int64_t index = indices[n];
  keys[n] = index >= 0 && index < num_codes
                ? static_cast<uint32_t>(n) / rows * static_cast<uint32_t>(num_codes) + static_cast<uint32_t>(index)
                : nowhere;
}

// edges[g]: the first place in sorted keys that does not lie below g.
__global__ void __launch_bounds__(256)
    find_edges(const uint32_t *keys, int64_t n, int64_t groups, int32_t *edges, float *counts) {
  start_kernel();
  const int64_t g = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (g > groups) return;
  const auto lower_bound = [&](int64_t key) {
    int64_t first = 0, last = n;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (keys[middle] < key)
        first = middle + 1;
      else
        last = middle;
    }
    return static_cast<int32_t>(first);
  };
  edges[g] = lower_bound(g);
  if (g < groups) counts[g] = static_cast<float>(lower_bound(g + 1) - edges[g]);
}

struct Groups {
  const uint32_t *keys, *order;
  const int32_t *edges;
  int64_t groups, codes, all_rows, rows;
};

// Work item: below `groups` the first chunk of that group; beyond it, the later chunk that starts in 256 sorted rows.
template <class V>
__global__ void __launch_bounds__(256) sum_chunks(vqk_rows x, Groups of, int64_t items, V *sums, V *partial) {
  start_kernel();
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (item >= items) return;
  const int64_t D = x.size[3];
  int64_t group = item, begin, end;
  V *to = sums + item * D;
  if (item < of.groups) {
    begin = of.edges[group];
    end = of.edges[group + 1];
  } else {
    const int64_t place = item - of.groups, first = place * chunk_rows;
    group = of.keys[first];
    if (group >= of.groups) return;
    const int64_t start = of.edges[group];
    begin = start + (first - start + chunk_rows - 1) / chunk_rows * chunk_rows;
    end = of.edges[group + 1];
    if (begin == start || begin >= end) return;
    to = partial + place * D;
  }
  end = min(end, begin + chunk_rows);
  const int64_t head = static_cast<uint32_t>(group) / static_cast<uint32_t>(of.codes);
  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    V sum = 0;
    for (int64_t i = begin; i < end; ++i)
      sum += load<V>(x.data, x.dtype, row_start(x, head, static_cast<int64_t>(of.order[i]) - head * of.rows) + d * x.stride[3]);
    to[d] = sum;
  }
}

// The later chunks of a group, in order, onto the first one.
template <class V>
__global__ void __launch_bounds__(256) add_chunks(Groups of, int64_t D, V *sums, const V *partial) {
  start_kernel();
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (group >= of.groups) return;
  const int64_t begin = of.edges[group], end = of.edges[group + 1];
  if (end - begin <= chunk_rows) return;
  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    V sum = sums[group * D + d];
    for (int64_t first = begin + chunk_rows; first < end; first += chunk_rows) sum += partial[first / chunk_rows * D + d];
    sums[group * D + d] = sum;
  }
}

template <class V>
struct Memory {
  Memory(void *memory, int64_t all_rows, int64_t groups, int64_t dim)
      : workspace(memory),
        sorting(workspace, all_rows),
        edges(workspace.take<int32_t>(groups + 1)),
        places(ceil_div(all_rows, chunk_rows)),
        partial(workspace.take<V>(places * dim)) {}
  Workspace workspace;
  sort::Buffers sorting;
  int32_t *edges;
  int64_t places;
  V *partial;
};

template <class V>
int32_t run(const vqk_rows &x, const int64_t *indices, int64_t num_codes, V *sums, float *counts, void *workspace, void *stream) {
  const int64_t rows = x.size[1] * x.size[2], all_rows = x.size[0] * rows, groups = x.size[0] * num_codes, D = x.size[3];
  const Memory<V> memory(workspace, all_rows, groups, D);
  const auto blocks = [](int64_t items, int64_t each) { return dim3(static_cast<uint32_t>(ceil_div(items, each))); };
  int32_t status = launch("codebook_sum", make_keys, {blocks(all_rows, 256), 256, 0, stream}, indices, all_rows,
                          static_cast<uint32_t>(rows), num_codes, static_cast<uint32_t>(groups), memory.sorting.keys[0]);
  int side = 0;
  if (status == VQK_OK && all_rows > 0)
    status = sort::sort(memory.sorting, all_rows, static_cast<uint64_t>(groups) + 1, stream, side);
  const Groups of{memory.sorting.keys[side], memory.sorting.positions[side], memory.edges, groups, num_codes, all_rows, rows};
  if (status == VQK_OK)
    status = launch("codebook_sum", find_edges, {blocks(groups + 1, 256), 256, 0, stream}, of.keys, all_rows, groups,
                    memory.edges, counts);
  if (status != VQK_OK || D == 0) return status;
  uint32_t width = 1;
  while (width < D && width < 128) width *= 2;
  const dim3 block(width, 256 / width);
  status = launch("codebook_sum", sum_chunks<V>, {blocks(groups + memory.places, block.y), block, 0, stream}, x, of,
                  groups + memory.places, sums, memory.partial);
  if (status != VQK_OK || all_rows <= chunk_rows) return status;
  return launch("codebook_sum", add_chunks<V>, {blocks(groups, block.y), block, 0, stream}, of, D, sums, memory.partial);
}

}  // namespace
}  // namespace vqk

int64_t vqk_cuda_codebook_sum_workspace(const vqk_rows *x, int64_t num_codes) {
  using namespace vqk;
  const int64_t all_rows = x->size[0] * x->size[1] * x->size[2], groups = x->size[0] * num_codes, D = x->size[3];
  if (x->dtype == VQK_F64) return Memory<double>(nullptr, all_rows, groups, D).workspace.bytes();
  return Memory<float>(nullptr, all_rows, groups, D).workspace.bytes();
}

int32_t vqk_cuda_codebook_sum(const vqk_rows *input, const int64_t *indices, int64_t num_codes, void *sums, float *counts,
                              void *workspace, int32_t device, void *stream) {
  using namespace vqk;
  const OnDevice guard(device);
  if (guard.status() != VQK_OK) return guard.status();
  const vqk_rows x = with_long_rows(*input);
  if (const int32_t status = check_sizes("codebook_sum", x.size[0], x.size[1] * x.size[2], num_codes)) return status;
  return x.dtype == VQK_F64 ? run<double>(x, indices, num_codes, static_cast<double *>(sums), counts, workspace, stream)
                            : run<float>(x, indices, num_codes, static_cast<float *>(sums), counts, workspace, stream);
}
