// lookup: gather codes into rows of any layout and dtype, in place of gather + cast + permute.
#include "cpu/elements.h"

namespace vqk {
namespace {

// Rows that a channel-first block writes side by side: whole cache lines for 16- and 32-bit outputs.
constexpr int64_t lanes = 32;

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
        for (int64_t d = 0; d < D; ++d) {
          auto *to = target + d * out_step;
          for (int64_t i = 0; i < count; ++i) to[i * out.stride[2]] = Out::put(In::get(source[i][d * step[i]]));
        }
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
