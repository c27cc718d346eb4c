// codebook_sum: per code, the sum of its rows in an order that depends on the data alone, never on the threads.
//
// Rows that lie in memory one after another (stride_d = 1) are sorted by code and summed code by code. Channel-first
// rows are read where they are, in transposed tiles, and added to the accumulator of their code: sorted access would
// touch one cache line per element. Both add the same numbers in the same order.
#include "cpu/elements.h"

namespace vqk {
namespace {

constexpr int64_t chunk_rows = 256;  // CHUNK in ops/codebook_sum

// Rows grouped by (head, code), stable: those of group g are order[edges[g] .. edges[g + 1]), row numbers in the head.
struct Groups {
  std::unique_ptr<int32_t[]> order;  // or, for accumulation in place, by row: its rank in its group
  std::unique_ptr<int32_t[]> edges;
  std::unique_ptr<int32_t[]> slots;  // first partial sum of a group of more than one chunk
  int64_t partials = 0;
};

int64_t chunks(int64_t rows) { return (rows + chunk_rows - 1) / chunk_rows; }

// Counting sort: two passes over blocks of rows, one histogram per block.
int32_t group(const int64_t *indices, int64_t heads, int64_t rows, int64_t codes, bool ranks, Groups &groups) {
  // A histogram must stay cheap beside the rows that it counts.
  const int64_t wanted = (num_threads() + heads - 1) / std::max<int64_t>(heads, 1);
  const int64_t blocks = std::max<int64_t>(1, std::min(wanted, rows / std::max<int64_t>(4 * codes, 8192)));
  const int64_t block_rows = (rows + blocks - 1) / blocks;
  groups.order = allocate<int32_t>(heads * rows);
  groups.edges = allocate<int32_t>(heads * codes + 1);
  groups.slots = allocate<int32_t>(heads * codes);
  const auto histogram = allocate<int32_t>(heads * blocks * codes);
  if (!groups.order || !groups.edges || !groups.slots || !histogram) return out_of_memory("codebook_sum");

  IndexCheck check(codes);
  const auto each_block = [&](const auto &body) {
    parallel_for(0, heads * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t h = i / blocks, first = i % blocks * block_rows;
        body(h, histogram.get() + i * codes, first, std::min(first + block_rows, rows));
      }
    });
  };
  each_block([&](int64_t h, int32_t *count, int64_t first, int64_t last) {
    std::fill(count, count + codes, 0);
    const int64_t *index = indices + h * rows;
    for (int64_t n = first; n < last; ++n)
      if (check.ok(index[n], h * rows + n) && index[n] >= 0) ++count[index[n]];
  });
  if (const int32_t status = check.status("codebook_sum", indices)) return status;

  int32_t next = 0;
  for (int64_t g = 0; g < heads * codes; ++g) {
    const int64_t h = g / codes, k = g % codes;
    groups.edges[g] = next;
    for (int64_t i = h * blocks; i < (h + 1) * blocks; ++i) {
      const int32_t count = histogram[i * codes + k];
      histogram[i * codes + k] = next;
      next += count;
    }
    const int64_t size = next - groups.edges[g];
    groups.slots[g] = static_cast<int32_t>(groups.partials);
    if (size > chunk_rows) groups.partials += chunks(size);
  }
  groups.edges[heads * codes] = next;

  each_block([&](int64_t h, int32_t *position, int64_t first, int64_t last) {
    const int64_t *index = indices + h * rows;
    for (int64_t n = first; n < last; ++n) {
      if (index[n] < 0) continue;
      const int32_t at = position[index[n]]++;
      if (ranks)
        groups.order[h * rows + n] = at - groups.edges[h * codes + index[n]];
      else
        groups.order[at] = static_cast<int32_t>(n);
    }
  });
  return VQK_OK;
}

// Where row n of a head starts, in elements.
struct Locate {
  explicit Locate(const vqk_rows &x)
      : width(x.size[2]), outer(x.stride[1]), inner(x.stride[2]), linear(x.size[1] == 1 || outer == width * inner) {}
  int64_t operator()(int64_t n) const {
    if (linear) return n * inner;
    const uint32_t row = static_cast<uint32_t>(n), size = static_cast<uint32_t>(width);
    return static_cast<int64_t>(row / size) * outer + static_cast<int64_t>(row % size) * inner;
  }
  int64_t width, outer, inner;
  bool linear;
};

// Sorted rows lie anywhere: no hardware prefetcher sees the next one coming.
constexpr int64_t bytes_ahead = 4096;

// Sum of `count` rows, order[0 .. count); order[.. available) are the rows that will be asked for next.
template <class T>
VQK_CLONES void add_rows(const typename T::raw *x, const Locate &locate, const int32_t *order, int64_t count, int64_t available,
                         int64_t D, typename T::value *__restrict out) {
  using value = typename T::value;
  constexpr int64_t narrow = 8;
  const int64_t bytes = D * static_cast<int64_t>(sizeof *x), ahead = std::min<int64_t>(16, bytes_ahead / bytes + 1);
  const auto fetch = [&](int64_t i) {
    if (i + ahead >= available) return;
    const char *row = reinterpret_cast<const char *>(x + locate(order[i + ahead]));
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte);
  };
  if (D <= narrow) {
    // Few dims: the accumulator lives in registers, or each row would wait for the store of the row before.
    value sum[narrow] = {};
    for (int64_t i = 0; i < count; ++i) {
      fetch(i);
      const auto *row = x + locate(order[i]);
      if (D == narrow)
        for (int64_t d = 0; d < narrow; ++d) sum[d] += T::get(row[d]);
      else
        for (int64_t d = 0; d < D; ++d) sum[d] += T::get(row[d]);
    }
    std::copy(sum, sum + D, out);
    return;
  }
  std::fill(out, out + D, value{});
  for (int64_t i = 0; i < count; ++i) {
    fetch(i);
    const auto *__restrict row = x + locate(order[i]);
    for (int64_t d = 0; d < D; ++d) out[d] += T::get(row[d]);
  }
}

// Rows sorted by code; every thread takes an equal share of rows and codes, cut at chunk boundaries.
template <class T>
int32_t sum_sorted(const vqk_rows &x, const Groups &groups, int64_t codes, typename T::value *sums) {
  using value = typename T::value;
  const int64_t D = x.size[3], all = x.size[0] * codes;
  const Locate locate(x);
  const int32_t *edges = groups.edges.get();
  const auto partials = allocate<value>(groups.partials * D);
  if (!partials) return out_of_memory("codebook_sum");

  // A code costs as much as its rows, plus one for writing the sum.
  const auto cost = [&](int64_t g) { return edges[g] + g; };
  parallel_for(0, cost(all), row_grain(D), [&](int64_t begin, int64_t end) {
    int64_t g = 0;
    for (int64_t stop = all; g < stop;) {
      const int64_t middle = (g + stop) / 2;
      if (cost(middle + 1) > begin)
        stop = middle;
      else
        g = middle + 1;
    }
    for (; g < all && cost(g) < end; ++g) {
      const int64_t size = edges[g + 1] - edges[g];
      const auto *head = pointer<T>(x.data) + g / codes * x.stride[0];
      for (int64_t chunk = chunks(std::max<int64_t>(begin - cost(g), 0)); chunk == 0 || chunk * chunk_rows < size; ++chunk) {
        const int64_t first = chunk * chunk_rows;
        if (cost(g) + first >= end) break;
        value *out = size > chunk_rows ? partials.get() + (groups.slots[g] + chunk) * D : sums + g * D;
        const int64_t start = edges[g] + first;
        add_rows<T>(head, locate, groups.order.get() + start, std::min(chunk_rows, size - first),
                    edges[(g / codes + 1) * codes] - start, D, out);
      }
    }
  });

  if (groups.partials == 0) return VQK_OK;
  parallel_for(0, all, std::max<int64_t>(1, all / (4 * num_threads())), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t size = edges[g + 1] - edges[g];
      if (size <= chunk_rows) continue;
      value *__restrict out = sums + g * D;
      const value *__restrict partial = partials.get() + groups.slots[g] * D;
      std::copy(partial, partial + D, out);
      for (int64_t chunk = 1; chunk < chunks(size); ++chunk)
        for (int64_t d = 0; d < D; ++d) out[d] += partial[chunk * D + d];
    }
  });
  return VQK_OK;
}

// One head and `width` dims: rows in the order of memory, each added to its code; a code's chunk moves to `carry` when full.
template <class T, int width>
VQK_CLONES void accumulate(const vqk_rows &x, const int64_t *indices, const Groups &groups, int64_t codes, int64_t head,
                           int64_t first_dim, typename T::value *__restrict sum, typename T::value *__restrict carry,
                           typename T::value *sums) {
  using value = typename T::value;
  constexpr int64_t tile_rows = 32;
  const int64_t B = x.size[1], S = x.size[2], D = x.size[3], step = x.stride[2], dim_step = x.stride[3];
  const int64_t dims = std::min<int64_t>(width, D - first_dim);
  const int32_t *edges = groups.edges.get() + head * codes;
  const int64_t base = groups.slots[head * codes];
  std::fill(sum, sum + codes * width, value{});
  value tile[tile_rows][width] = {};
  for (int64_t b = 0; b < B; ++b) {
    const int64_t row = (head * B + b) * S;
    const auto *source = pointer<T>(x.data) + head * x.stride[0] + b * x.stride[1] + first_dim * dim_step;
    for (int64_t s = 0; s < S; s += tile_rows) {
      const int64_t count = std::min(tile_rows, S - s);
      for (int64_t d = 0; d < dims; ++d) {
        const auto *from = source + d * dim_step + s * step;
        if (step == 1 && count == tile_rows)
          for (int64_t i = 0; i < tile_rows; ++i) tile[i][d] = T::get(from[i]);
        else
          for (int64_t i = 0; i < count; ++i) tile[i][d] = T::get(from[i * step]);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = indices[row + s + i];
        if (k < 0) continue;
        value *to = sum + k * width;
        const int32_t rank = groups.order[row + s + i];
        if (rank % chunk_rows == 0 && rank > 0) {
          value *kept = carry + (groups.slots[head * codes + k] - base) * width;
          for (int d = 0; d < width; ++d) {
            kept[d] = rank == chunk_rows ? to[d] : kept[d] + to[d];
            to[d] = 0;
          }
        }
        for (int d = 0; d < width; ++d) to[d] += tile[i][d];
      }
    }
  }
  for (int64_t k = 0; k < codes; ++k) {
    value *out = sums + (head * codes + k) * D + first_dim;
    const value *last = sum + k * width;
    if (edges[k + 1] - edges[k] > chunk_rows) {
      const value *kept = carry + (groups.slots[head * codes + k] - base) * width;
      for (int64_t d = 0; d < dims; ++d) out[d] = kept[d] + last[d];
    } else {
      std::copy(last, last + dims, out);
    }
  }
}

template <class T, int width>
int32_t sum_in_place(const vqk_rows &x, const int64_t *indices, const Groups &groups, int64_t codes, typename T::value *sums) {
  using value = typename T::value;
  const int64_t heads = x.size[0], parts = (x.size[3] + width - 1) / width;
  int64_t carried = 0;
  for (int64_t h = 0; h < heads; ++h)
    carried = std::max(carried, (h + 1 < heads ? groups.slots[(h + 1) * codes] : groups.partials) - groups.slots[h * codes]);
  std::atomic<bool> failed{false};
  parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    const auto sum = allocate<value>(codes * width), carry = allocate<value>(carried * width);
    if (!sum || !carry) {
      failed = true;
      return;
    }
    for (int64_t i = begin; i < end; ++i)
      accumulate<T, width>(x, indices, groups, codes, i / parts, i % parts * width, sum.get(), carry.get(), sums);
  });
  return failed ? out_of_memory("codebook_sum") : VQK_OK;
}

}  // namespace
}  // namespace vqk

int32_t vqk_cpu_codebook_sum(const vqk_rows *input, const int64_t *indices, int64_t num_codes, void *sums, float *counts) {
  using namespace vqk;
  const vqk_rows x = with_long_rows(*input);
  const int64_t heads = x.size[0], rows = x.size[1] * x.size[2], D = x.size[3];
  if (heads * rows > INT32_MAX) return fail(VQK_UNSUPPORTED, "codebook_sum: %" PRId64 " rows, row ids are 32-bit", heads * rows);

  const bool sorted = x.stride[3] == 1 || D == 1;
  Groups groups;
  if (const int32_t status = group(indices, heads, rows, num_codes, !sorted, groups)) return status;
  for (int64_t g = 0; g < heads * num_codes; ++g) counts[g] = static_cast<float>(groups.edges[g + 1] - groups.edges[g]);

  return with_dtype(x.dtype, [&](auto dtype) {
    using T = decltype(dtype);
    auto *out = static_cast<typename T::value *>(sums);
    if (sorted) return sum_sorted<T>(x, groups, num_codes, out);
    // A cache line of dims at a time, less if that would leave threads without work.
    if (heads * ((D + 15) / 16) >= num_threads()) return sum_in_place<T, 16>(x, indices, groups, num_codes, out);
    return sum_in_place<T, 4>(x, indices, groups, num_codes, out);
  });
}
