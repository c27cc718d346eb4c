// residual_nearest on CPU: every level of a residual search in one call, on the kernels of nearest.
//
// Many rows: a block of them passes through all levels while its residuals lie in cache, and the packed codebooks stream by.
// Few rows: level by level, so that all threads work on every search; what a search of its own costs is saved all the same.
#include "cpu/elements.h"
#include "cpu/nearest_search.h"

namespace vqk {
namespace {

constexpr int64_t kTile = 16;  // rows and dims that are transposed at a time

struct Call {
  const vqk_rows *x;
  const vqk_codes *codebooks;
  int64_t levels;
  int32_t isa;
  const Kernels *kernels;
  const void *const *packed;
  int64_t *indices;
  float *score;
  const vqk_rows *out;

  int64_t heads() const { return x->size[0]; }
  int64_t rows() const { return x->size[1] * x->size[2]; }
  int64_t dim() const { return x->size[3]; }
  int32_t dtype() const { return x->dtype == VQK_F64 ? VQK_F64 : VQK_F32; }
  const PackedHead *head(int64_t level, int64_t index) const {
    const PackedHead *first = static_cast<const PackedHead *>(packed[level]);
    return reinterpret_cast<const PackedHead *>(static_cast<const char *>(packed[level]) + index * first->bytes);
  }
};

// `rows` rows of each head, one after the other.
vqk_rows compact(void *data, int64_t heads, int64_t rows, int64_t dim, int32_t dtype) {
  return {data, {heads, 1, rows, dim}, {rows * dim, rows * dim, dim, 1}, dtype, 0};
}

// Calls visit(offset of the first row in elements, first row, count) for rows [first, first + count) of a head, image by image.
template <class F>
void for_each_image(const vqk_rows &x, int64_t head, int64_t first, int64_t count, const F &visit) {
  const int64_t inner = x.size[2];
  for (int64_t done = 0; done < count;) {
    const int64_t row = first + done, rows = std::min(count - done, inner - row % inner);
    visit(head * x.stride[0] + row / inner * x.stride[1] + row % inner * x.stride[2], done, rows);
    done += rows;
  }
}

// Rows of any layout and dtype into compact ones.
template <class In, class V>
void read_rows(const vqk_rows &x, int64_t head, int64_t first, int64_t count, V *to) {
  const int64_t D = x.size[3], row_step = x.stride[2], dim_step = x.stride[3];
  for_each_image(x, head, first, count, [&](int64_t at, int64_t done, int64_t rows) {
    const typename In::raw *from = pointer<In>(x.data) + at;
    V *target = to + done * D;
    if (dim_step == 1) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < D; ++d) target[r * D + d] = static_cast<V>(In::get(from[r * row_step + d]));
      return;
    }
    for (int64_t r = 0; r < rows; r += kTile)
      for (int64_t d = 0; d < D; d += kTile) {
        const int64_t height = std::min(kTile, rows - r), width = std::min(kTile, D - d);
        const typename In::raw *tile = from + r * row_step + d * dim_step;
        V *corner = target + r * D + d;
        if (height == kTile && width == kTile) {
          V planes[kTile * kTile];
          for (int64_t j = 0; j < kTile; ++j)
            for (int64_t i = 0; i < kTile; ++i)
              planes[j * kTile + i] = static_cast<V>(In::get(tile[i * row_step + j * dim_step]));
          transpose<kTile, kTile>(planes, corner, D);
        } else {
          for (int64_t j = 0; j < width; ++j)
            for (int64_t i = 0; i < height; ++i) corner[i * D + j] = static_cast<V>(In::get(tile[i * row_step + j * dim_step]));
        }
      }
  });
}

// The inverse; both sides are of type V.
template <class V>
void write_rows(const V *from, const vqk_rows &out, int64_t head, int64_t first, int64_t count) {
  const int64_t D = out.size[3], row_step = out.stride[2], dim_step = out.stride[3];
  for_each_image(out, head, first, count, [&](int64_t at, int64_t done, int64_t rows) {
    V *to = static_cast<V *>(out.data) + at;
    const V *source = from + done * D;
    if (dim_step == 1) {
      for (int64_t r = 0; r < rows; ++r) std::copy_n(source + r * D, D, to + r * row_step);
      return;
    }
    for (int64_t d = 0; d < D; d += kTile)
      for (int64_t r = 0; r < rows; r += kTile) {
        const int64_t height = std::min(kTile, rows - r), width = std::min(kTile, D - d);
        const V *corner = source + r * D + d;
        V *tile = to + r * row_step + d * dim_step;
        if (height == kTile && width == kTile && row_step == 1) {
          V copy[kTile * kTile];
          for (int64_t i = 0; i < kTile; ++i) std::copy_n(corner + i * D, kTile, copy + i * kTile);
          transpose<kTile, kTile>(copy, tile, dim_step);
        } else {
          for (int64_t j = 0; j < width; ++j)
            for (int64_t i = 0; i < height; ++i) tile[i * row_step + j * dim_step] = corner[i * D + j];
        }
      }
  });
}

// residual -= code and sum += code, each rounded once: the order of the contract.
template <class E, class V>
VQK_CLONES void take_codes(const vqk_codes &codebook, int64_t head, const int64_t *indices, int64_t count, V *__restrict residual,
                           V *__restrict sum) {
  const int64_t D = codebook.size[2];
  const typename E::raw *codes = pointer<E>(codebook.data) + head * codebook.stride[0];
  for (int64_t r = 0; r < count; ++r) {
    const typename E::raw *code = codes + indices[r] * codebook.stride[1];
    for (int64_t d = 0; d < D; ++d) {
      const V value = static_cast<V>(E::get(code[d]));
      residual[r * D + d] = residual[r * D + d] - value;
      sum[r * D + d] = sum[r * D + d] + value;
    }
  }
}

template <class V>
void take_codes_of(const vqk_codes &codebook, int64_t head, const int64_t *indices, int64_t count, V *residual, V *sum) {
  with_dtype(codebook.dtype, [&](auto e) { take_codes<decltype(e)>(codebook, head, indices, count, residual, sum); });
}

template <class V>
void read_rows_of(const Call &call, int64_t head, int64_t first, int64_t count, V *residual, V *sum) {
  with_dtype(call.x->dtype, [&](auto in) { read_rows<decltype(in)>(*call.x, head, first, count, residual); });
  std::fill_n(sum, count * call.dim(), V{0});
}

// A block of rows through all levels, in scratch of so many bytes.
template <class V>
void search_block(const Call &call, int64_t head, int64_t first, int64_t count, int64_t block_rows, char *scratch) {
  const int64_t D = call.dim(), elements = round_up(block_rows * D, 64);
  V *residual = reinterpret_cast<V *>(scratch), *sum = residual + elements;
  read_rows_of(call, head, first, count, residual, sum);
  vqk_rows rows = compact(residual, call.heads(), count, D, call.dtype());
  rows.stride[0] = 0;  // every head finds its rows here
  Block block;
  block.x = &rows;
  block.head_index = head;
  block.first = 0;
  block.rows = count;
  block.padded_rows = round_up(count, call.kernels->row_tile);
  block.metric = VQK_L2;
  block.precision = VQK_EXACT;
  for (int64_t level = 0; level < call.levels; ++level) {
    const int64_t at = (level * call.heads() + head) * call.rows() + first;
    block.codebook = call.codebooks + level;
    block.head = call.head(level, head);
    block.indices = call.indices + at;
    block.score = call.score + at;
    block_bytes(&rows, block.head, call.kernels, block_rows, reinterpret_cast<char *>(sum + elements), &block);
    call.kernels->prepare(&block);
    call.kernels->screen(&block, 0, block.head->blocks);
    call.kernels->finish(&block);
    take_codes_of(*block.codebook, head, block.indices, count, residual, sum);
  }
  write_rows(sum, *call.out, head, first, count);
}

template <class V>
int32_t by_blocks(const Call &call, int64_t block_rows, int64_t blocks) {
  const vqk_rows rows = compact(nullptr, call.heads(), block_rows, call.dim(), call.dtype());
  int64_t bytes = 0;
  for (int64_t level = 0; level < call.levels; ++level)
    bytes = std::max(bytes, block_bytes(&rows, call.head(level, 0), call.kernels, block_rows, nullptr, nullptr));
  bytes += 2 * round_up(block_rows * call.dim(), 64) * static_cast<int64_t>(sizeof(V));
  bool failed = false;
  parallel_for(0, call.heads() * blocks, 1, [&](int64_t begin, int64_t end) {
    char *scratch = thread_memory(bytes);
    if (scratch == nullptr) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * block_rows;
      search_block<V>(call, item / blocks, first, std::min(block_rows, call.rows() - first), block_rows, scratch);
    }
  });
  return failed ? out_of_memory("residual_nearest") : VQK_OK;
}

// Calls visit(head, first row, count, place among the rows of all heads) for all rows, in as many pieces as are worth a thread.
template <class F>
void for_all_rows(const Call &call, const F &visit) {
  const int64_t rows = call.rows();
  parallel_for(0, call.heads() * rows, row_grain(call.dim()), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin % rows, count = std::min(end - begin, rows - first);
      visit(begin / rows, first, count, begin);
      begin += count;
    }
  });
}

template <class V>
int32_t by_levels(const Call &call) {
  const int64_t rows = call.rows(), D = call.dim(), places = call.heads() * rows;
  const auto memory = allocate<V>(2 * places * D);
  if (memory == nullptr) return out_of_memory("residual_nearest");
  V *residual = memory.get(), *sum = residual + places * D;
  const vqk_rows left = compact(residual, call.heads(), rows, D, call.dtype());
  for_all_rows(call, [&](int64_t head, int64_t first, int64_t count, int64_t at) {
    read_rows_of(call, head, first, count, residual + at * D, sum + at * D);
  });
  for (int64_t level = 0; level < call.levels; ++level) {
    const vqk_codes *codebook = call.codebooks + level;
    const void *packed = call.packed == nullptr ? nullptr : call.packed[level];
    int64_t *indices = call.indices + level * places;
    float *score = call.score + level * places;
    if (const int32_t status = vqk_cpu_nearest(&left, codebook, VQK_L2, VQK_EXACT, call.isa, packed, indices, score))
      return status;
    for_all_rows(call, [&](int64_t head, int64_t, int64_t count, int64_t at) {
      take_codes_of(*codebook, head, indices + at, count, residual + at * D, sum + at * D);
    });
  }
  for_all_rows(call, [&](int64_t head, int64_t first, int64_t count, int64_t at) {
    write_rows(sum + at * D, *call.out, head, first, count);
  });
  return VQK_OK;
}

}  // namespace
}  // namespace vqk

int32_t vqk_cpu_residual_nearest_needs_packing(const vqk_rows *x, const vqk_codes *codebooks, int32_t levels) {
  const int32_t dtype = x->dtype == VQK_F64 ? VQK_F64 : VQK_F32;
  const vqk_rows residual = vqk::compact(nullptr, x->size[0], x->size[1] * x->size[2], x->size[3], dtype);
  return std::any_of(codebooks, codebooks + levels,
                     [&](const vqk_codes &codebook) { return vqk_cpu_nearest_needs_packing(&residual, &codebook) != 0; });
}

int32_t vqk_cpu_residual_nearest(const vqk_rows *x, const vqk_codes *codebooks, int32_t levels, int32_t isa,
                                 const void *const *packed, int64_t *indices, float *score, const vqk_rows *out) {
  const vqk::Call call = {x, codebooks, levels, isa, vqk::kernels_for(isa, x->size[3]), packed, indices, score, out};
  if (call.kernels == nullptr) return vqk::fail(VQK_UNSUPPORTED, "instruction set %d is not available here", isa);
  for (int32_t level = 0; level < levels; ++level)
    if (const int32_t status = vqk::check_codes(codebooks + level)) return status;
  if (call.heads() * call.rows() == 0) return VQK_OK;
  const int64_t block_rows = vqk::rows_per_block(call.kernels, call.heads(), call.rows());
  const int64_t blocks = (call.rows() + block_rows - 1) / block_rows;
  const bool wide = call.dtype() == VQK_F64;
  if (packed != nullptr && call.heads() * blocks >= vqk::num_threads())
    return wide ? vqk::by_blocks<double>(call, block_rows, blocks) : vqk::by_blocks<float>(call, block_rows, blocks);
  return wide ? vqk::by_levels<double>(call) : vqk::by_levels<float>(call);
}
