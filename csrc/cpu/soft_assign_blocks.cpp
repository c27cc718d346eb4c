// What soft_assign and soft_assign_grad share: sizes, packed codes, rows as floats, scores.
#include <cmath>

#include "cpu/soft_assign.h"

namespace vqk {
namespace {

// Scores of a block: in L2 where dims are few and a pair is cheap, else as many as make the codes worth reading.
constexpr int64_t kFewDims = 64, kFewScores = int64_t{1} << 18, kScores = int64_t{1} << 20;
constexpr int64_t kLeastRows = 24, kMostRows = 1536, kRowMultiple = 12;

const SoftKernels *soft_kernels(int32_t isa) {
  if (!vqk_cpu_has_isa(isa)) return nullptr;
#if defined(VQK_HAVE_NEON)
  if (isa == VQK_NEON) return &soft_kernels_neon;
#endif
#if defined(VQK_HAVE_AVX512)
  if (isa >= VQK_AVX512) return &soft_kernels_avx512;
#endif
#if defined(VQK_HAVE_AVX2)
  if (isa >= VQK_AVX2) return &soft_kernels_avx2;
#endif
  return &soft_kernels_scalar;
}

}  // namespace

int32_t soft_plan(const vqk_rows &x, const vqk_codes &codes, int32_t isa, SoftPlan &plan) {
  plan.kernels = soft_kernels(isa);
  if (plan.kernels == nullptr) return fail(VQK_UNSUPPORTED, "instruction set %d is not available", isa);
  plan.heads = x.size[0];
  plan.rows = x.size[1] * x.size[2];
  plan.codes = codes.size[1];
  plan.dim = codes.size[2];
  plan.panels = divide_up(plan.codes, plan.kernels->panel);
  plan.padded_codes = plan.panels * plan.kernels->panel;
  plan.pitch = divide_up(plan.padded_codes, Floats::kLine) * Floats::kLine + Floats::kLine;
  plan.row_pitch = divide_up(plan.dim, Floats::kLine) * Floats::kLine + Floats::kLine;
  const int64_t fit = (plan.dim <= kFewDims ? kFewScores : kScores) / plan.padded_codes / kRowMultiple * kRowMultiple;
  plan.block_rows = std::min(std::max(fit, kLeastRows), kMostRows);
  return VQK_OK;
}

void soft_pack(const SoftPlan &plan, const vqk_codes &codes, int64_t head, bool squared, float *packed, float *offset,
               float *plain) {
  const int64_t width = plan.kernels->panel, dim = plan.dim, step = codes.stride[2];
  with_dtype(codes.dtype, [&](auto type) {
    using E = decltype(type);
    const auto *source = pointer<E>(codes.data) + head * codes.stride[0];
    parallel_for(0, plan.panels, soft_grain(width * dim), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * width; k < end * width; ++k) {
        float *to = plan.panel(packed, k / width) + k % width, *row = plain == nullptr ? nullptr : plain + k * plan.row_pitch;
        double square = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const float value = k < plan.codes ? static_cast<float>(E::get(source[k * codes.stride[1] + d * step])) : 0.0f;
          to[d * width] = value;
          if (row != nullptr) row[d] = value;
          square += static_cast<double>(value) * static_cast<double>(value);
        }
        if (row != nullptr) std::fill(row + dim, row + plan.row_pitch, 0.0f);
        if (offset != nullptr) offset[k] = k >= plan.codes ? INFINITY : squared ? static_cast<float>(square) : 0.0f;
      }
    });
  });
}

void soft_load(const SoftPlan &plan, const vqk_rows &x, const float *weight, int64_t head, int64_t first, int64_t count,
               float *out) {
  const int64_t dim = plan.dim, inner = x.size[2], step = x.stride[3];
  with_dtype(x.dtype, [&](auto type) {
    using X = decltype(type);
    const auto *source = pointer<X>(x.data) + head * x.stride[0];
    parallel_for(0, count, row_grain(dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = first + i;
        const auto *row = source + n / inner * x.stride[1] + n % inner * x.stride[2];
        float *to = out + i * plan.row_pitch;
        const bool counts = weight[head * plan.rows + n] != 0;
        for (int64_t d = 0; d < dim; ++d) to[d] = counts ? static_cast<float>(X::get(row[d * step])) : 0.0f;
      }
    });
  });
}

void soft_scores(const SoftPlan &plan, const float *x, int64_t count, const float *packed, const float *offset, double scale,
                 double factor, float *out) {
  const SoftKernels &kernels = *plan.kernels;
  const int64_t tile = kernels.tile, width = kernels.panel;
  parallel_ranges(plan.panels, divide_up(count, tile), soft_grain(tile * width * plan.dim),
                  [&](int64_t panel, int64_t begin, int64_t end) {
                    [[maybe_unused]] const FlushSubnormals flush;
                    const int64_t first = begin * tile, rows = std::min(end * tile, count) - first;
                    kernels.scores(x + first * plan.row_pitch, plan.row_pitch, rows, plan.dim, plan.panel(packed, panel),
                                   offset + panel * width, static_cast<float>(scale), static_cast<float>(factor),
                                   out + first * plan.pitch + panel * width, plan.pitch);
                  });
}

}  // namespace vqk
