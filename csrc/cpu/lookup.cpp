// lookup: gather codes into rows of any layout and dtype, in place of gather + cast + permute.
#include "cpu/elements.h"

namespace vqk {
namespace {

constexpr int64_t lanes = 256;     // rows of a block: long runs in every plane of a channel-first output
constexpr int64_t tile_dims = 16;  // planes that are written at a time: a cache line of every code
constexpr int64_t tile_rows = 32;

// A block of rows into planes: a cache line of every code at a time, transposed, then one long run per plane.
template <class In, class Out>
void scatter(const typename In::raw *const *source, const int64_t *step, int64_t count, int64_t D, typename Out::raw *target,
             int64_t row_step, int64_t dim_step) {
  using raw = typename Out::raw;
  raw gathered[tile_rows * tile_dims] = {}, tile[tile_dims * lanes];
  for (int64_t first = 0; first < D; first += tile_dims) {
    const int64_t dims = std::min(tile_dims, D - first);
    for (int64_t row = 0; row < count; row += tile_rows) {
      for (int64_t i = 0; i < std::min(tile_rows, count - row); ++i) {
        const auto *from = source[row + i] + first * step[row + i];
        raw *to = gathered + i * tile_dims;
        if (step[row + i] == 1 && dims == tile_dims)
          for (int64_t d = 0; d < tile_dims; ++d) to[d] = Out::put(In::get(from[d]));
        else
          for (int64_t d = 0; d < dims; ++d) to[d] = Out::put(In::get(from[d * step[row + i]]));
      }
      transpose<tile_rows, tile_dims>(gathered, tile + row, lanes);
    }
    for (int64_t d = 0; d < dims; ++d) {
      raw *to = target + (first + d) * dim_step;
      const raw *from = tile + d * lanes;
      if (row_step == 1)
        std::copy(from, from + count, to);
      else
        for (int64_t i = 0; i < count; ++i) to[i * row_step] = from[i];
    }
  }
}

template <class In, class Out>
void gather(const vqk_codes &codebook, const int64_t *indices, const vqk_rows &out, IndexCheck &check) {
  const int64_t B = out.size[1], S = out.size[2], D = out.size[3];
  const int64_t code_step = codebook.stride[1], in_step = codebook.stride[2], out_step = out.stride[3];
  const int64_t blocks = (S + lanes - 1) / lanes;
  const bool copy = std::is_same<In, Out>::value && in_step == 1 && out_step == 1;

  parallel_for(0, out.size[0] * B * blocks, std::max<int64_t>(1, row_grain(D) / lanes), [&](int64_t begin, int64_t end) {
    static const typename In::raw zero{};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t h = block / (B * blocks), b = block / blocks % B, first = block % blocks * lanes;
      const int64_t count = std::min(lanes, S - first);
      const int64_t row = (h * B + b) * S + first;
      const auto *codes = pointer<In>(codebook.data) + h * codebook.stride[0];
      auto *target = pointer<Out>(out.data) + h * out.stride[0] + b * out.stride[1] + first * out.stride[2];

      // "No code" reads one zero over and over.
      const typename In::raw *source[lanes];
      int64_t step[lanes];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t index = indices[row + i];
        const bool code = check.ok(index, row + i) && index >= 0;
        source[i] = code ? codes + index * code_step : &zero;
        step[i] = code ? in_step : 0;
      }
      if (out_step == 1) {
        for (int64_t i = 0; i < count; ++i) {
          auto *to = target + i * out.stride[2];
          if (step[i] == 0 && source[i] == &zero)
            std::fill(to, to + D, typename Out::raw{});
          else if (copy)
            std::memcpy(to, source[i], static_cast<size_t>(D) * sizeof *to);
          else if (step[i] == 1)
            for (int64_t d = 0; d < D; ++d) to[d] = Out::put(In::get(source[i][d]));
          else
            for (int64_t d = 0; d < D; ++d) to[d] = Out::put(In::get(source[i][d * step[i]]));
        }
      } else {
        scatter<In, Out>(source, step, count, D, target, out.stride[2], out_step);
      }
    }
  });
}

}  // namespace
}  // namespace vqk

int32_t vqk_cpu_lookup(const vqk_codes *codebook, const int64_t *indices, const vqk_rows *out) {
  using namespace vqk;
  IndexCheck check(codebook->size[1]);
  const vqk_rows rows = with_long_rows(*out);
  with_dtype(codebook->dtype, [&](auto in) {
    with_dtype(rows.dtype, [&](auto result) { gather<decltype(in), decltype(result)>(*codebook, indices, rows, check); });
  });
  return check.status("lookup", indices);
}
