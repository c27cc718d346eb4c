// soft_assign_grad: the gradient of a softmax over all codes with respect to rows and codes, block of rows by block of rows.
#include "cpu/soft_assign.h"

namespace vqk {
namespace {

// Rows of a block in dx's dtype.
void store_rows(const SoftPlan &plan, const float *from, double factor, int64_t head, int64_t first, int64_t count,
                const vqk_rows &dx) {
  const int64_t inner = dx.size[2], step = dx.stride[3];
  with_dtype(dx.dtype, [&](auto type) {
    using X = decltype(type);
    auto *target = pointer<X>(dx.data) + head * dx.stride[0];
    parallel_for(0, count, row_grain(plan.dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        auto *to = target + (first + i) / inner * dx.stride[1] + (first + i) % inner * dx.stride[2];
        for (int64_t d = 0; d < plan.dim; ++d) to[d * step] = X::put(factor * static_cast<double>(from[i * plan.row_pitch + d]));
      }
    });
  });
}

// One head's sums over rows, panel by panel, less the codes' own part if squared, as (K, D).
void store_codes(const SoftPlan &plan, const float *sums, const float *plain, const double *totals, double factor, float *out) {
  const int64_t width = plan.kernels->panel;
  parallel_for(0, plan.codes, soft_grain(plan.dim), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const float *from = plan.panel(sums, k / width) + k % width, *code = plain + k * plan.row_pitch;
      const double total = totals == nullptr ? 0.0 : totals[k];
      for (int64_t d = 0; d < plan.dim; ++d)
        out[k * plan.dim + d] =
            static_cast<float>(factor * (static_cast<double>(from[d * width]) - total * static_cast<double>(code[d])));
    }
  });
}

// The gradient of a block's scores, in place.
int32_t to_gradients(const SoftPlan &plan, const float *weight, const float *usage, float entropy, float *soft, int64_t count,
                     float *scores) {
  std::atomic<bool> failed{false};
  parallel_for(0, count, soft_grain(8 * plan.codes), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushSubnormals flush;
    const Floats own(soft == nullptr ? plan.padded_codes : 0);
    if (!own) {
      failed = true;
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      float *a = soft == nullptr ? own.get() : soft + i * plan.pitch;
      if (soft == nullptr) std::fill(a, a + plan.padded_codes, 0.0f);
      plan.kernels->gradient(scores + i * plan.pitch, a, usage, entropy, weight[i], plan.padded_codes);
    }
  });
  return failed ? out_of_memory("soft_assign_grad") : VQK_OK;
}

}  // namespace
}  // namespace vqk

int32_t vqk_cpu_soft_assign_grad(const vqk_rows *x, const vqk_codes *codes, const float *weight, const float *grad_entropy,
                                 const float *grad_usage, const vqk_rows *grad_soft, const vqk_codes *values, int32_t squared,
                                 double temperature, int32_t isa, const vqk_rows *dx, float *dcodes) {
  using namespace vqk;
  SoftPlan plan;
  if (const int32_t status = soft_plan(*x, *codes, isa, plan)) return status;
  const SoftKernels &kernels = *plan.kernels;
  const bool with_soft = grad_soft != nullptr;
  const int64_t most = std::min(plan.block_rows, plan.rows), width = kernels.panel, tile = kernels.tile;
  const int64_t all = plan.padded_codes, vectors = divide_up(plan.dim, kernels.lanes), wide = width / kernels.lanes;
  const Floats packed(all * plan.dim), plain(all * plan.row_pitch), offset(all), sums(all * plan.dim), usage(all), ones(most),
      rows(most * plan.row_pitch), row_sums(most * plan.row_pitch), scores(most * plan.pitch);
  const Floats zeros(all), packed_values(with_soft ? all * plan.dim : 0), soft_rows(with_soft ? most * plan.row_pitch : 0),
      soft(with_soft ? most * plan.pitch : 0);
  const auto totals = allocate<double>(all);
  if (!packed || !plain || !offset || !sums || !usage || !ones || !rows || !row_sums || !scores || !zeros || !packed_values ||
      !soft_rows || !soft || !totals)
    return out_of_memory("soft_assign_grad");
  const double scale = squared ? 2.0 : 1.0, factor = scale / temperature;
  std::fill(ones.get(), ones.get() + most, 1.0f);
  std::fill(usage.get(), usage.get() + all, 0.0f);
  std::fill(zeros.get(), zeros.get() + all, 0.0f);
  for (int64_t head = 0; head < plan.heads; ++head) {
    soft_pack(plan, *codes, head, squared != 0, packed.get(), offset.get(), plain.get());
    if (with_soft) soft_pack(plan, *values, head, false, packed_values.get(), nullptr, nullptr);
    if (grad_usage != nullptr) std::copy_n(grad_usage + head * plan.codes, plan.codes, usage.get());
    const float entropy = grad_entropy == nullptr ? 0.0f : grad_entropy[head];
    std::fill(sums.get(), sums.get() + all * plan.dim, 0.0f);
    std::fill(totals.get(), totals.get() + all, 0.0);
    for (int64_t first = 0; first < plan.rows; first += plan.block_rows) {
      const int64_t count = std::min(plan.block_rows, plan.rows - first);
      soft_load(plan, *x, weight, head, first, count, rows.get());
      soft_scores(plan, rows.get(), count, packed.get(), offset.get(), scale, 1.0 / temperature, scores.get());
      if (with_soft) {
        soft_load(plan, *grad_soft, weight, head, first, count, soft_rows.get());
        soft_scores(plan, soft_rows.get(), count, packed_values.get(), zeros.get(), 1.0, 1.0, soft.get());
      }
      if (const int32_t status = to_gradients(plan, weight + head * plan.rows + first, usage.get(), entropy,
                                              with_soft ? soft.get() : nullptr, count, scores.get()))
        return status;
      std::fill(row_sums.get(), row_sums.get() + count * plan.row_pitch, 0.0f);
      parallel_ranges(divide_up(vectors, wide), divide_up(count, tile), soft_grain(tile * plan.codes * width),
                      [&](int64_t part, int64_t begin, int64_t end) {
                        [[maybe_unused]] const FlushSubnormals flush;
                        const int64_t row = begin * tile, dim = part * width;
                        kernels.row_sums(scores.get() + row * plan.pitch, plan.pitch, std::min(end * tile, count) - row,
                                         plain.get() + dim, plan.row_pitch, plan.codes, std::min(wide, vectors - part * wide),
                                         row_sums.get() + row * plan.row_pitch + dim, plan.row_pitch);
                      });
      store_rows(plan, row_sums.get(), factor, head, first, count, *dx);
      parallel_ranges(plan.panels, divide_up(plan.dim, tile), soft_grain(tile * count * width),
                      [&](int64_t panel, int64_t begin, int64_t end) {
                        [[maybe_unused]] const FlushSubnormals flush;
                        kernels.code_sums(scores.get() + panel * width, plan.pitch, count, rows.get(), plan.row_pitch,
                                          begin * tile, std::min(end * tile, plan.dim), plan.panel(sums.get(), panel));
                      });
      if (squared)
        parallel_for(0, plan.panels, soft_grain(width * count), [&](int64_t begin, int64_t end) {
          [[maybe_unused]] const FlushSubnormals flush;
          for (int64_t panel = begin; panel < end; ++panel)
            kernels.columns(scores.get() + panel * width, plan.pitch, count, ones.get(), totals.get() + panel * width);
        });
    }
    store_codes(plan, sums.get(), plain.get(), squared ? totals.get() : nullptr, factor, dcodes + head * plan.codes * plan.dim);
  }
  return VQK_OK;
}
