// lookup: gather codes into rows of any layout and dtype, in place of gather + cast + permute.
#include "cpu/elements.h"

namespace vqk {
namespace {

constexpr int64_t lanes = 256;     // rows of a block: long runs in every plane of a channel-first output
constexpr int64_t tile_dims = 16;  // planes that are written at a time: a cache line of every code
constexpr int64_t tile_rows = 32;

template <class In, class Out>
void scatter_tile(const typename In::raw *const *source, const int64_t *step, int64_t count, int64_t first, int64_t last,
                  typename Out::raw *target, int64_t row_step, int64_t dim_step) {
  typename Out::raw tile[tile_dims][tile_rows];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = first; d < last; ++d) tile[d - first][i] = Out::put(In::get(source[i][d * step[i]]));
  for (int64_t d = first; d < last; ++d) {
    auto *to = target + d * dim_step;
    if (row_step == 1)
      std::copy(tile[d - first], tile[d - first] + count, to);
    else
      for (int64_t i = 0; i < count; ++i) to[i * row_step] = tile[d - first][i];
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
        for (int64_t dim = 0; dim < D; dim += tile_dims)
          for (int64_t i = 0; i < count; i += tile_rows)
            scatter_tile<In, Out>(source + i, step + i, std::min(tile_rows, count - i), dim, std::min(dim + tile_dims, D),
                                  target + i * out.stride[2], out.stride[2], out_step);
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
