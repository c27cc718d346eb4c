// soft_assign: entropy and usage of a softmax over all codes, block of rows by block of rows.
#include "cpu/soft_assign.h"

#include <cmath>

int32_t vqk_cpu_soft_assign(const vqk_rows *x, const vqk_codes *codes, const float *weight, int32_t squared, double temperature,
                            int32_t isa, float *entropy, float *usage) {
  using namespace vqk;
  SoftPlan plan;
  if (const int32_t status = soft_plan(*x, *codes, isa, plan)) return status;
  const SoftKernels &kernels = *plan.kernels;
  const int64_t most = std::min(plan.block_rows, plan.rows), width = kernels.panel;
  const Floats packed(plan.padded_codes * plan.dim), offset(plan.padded_codes), rows(most * plan.row_pitch),
      scores(most * plan.pitch), factors(most);
  const auto total = allocate<double>(plan.padded_codes), own = allocate<double>(most);
  if (!packed || !offset || !rows || !scores || !factors || !total || !own) return out_of_memory("soft_assign");
  for (int64_t head = 0; head < plan.heads; ++head) {
    soft_pack(plan, *codes, head, squared != 0, packed.get(), offset.get(), nullptr);
    std::fill(total.get(), total.get() + plan.padded_codes, 0.0);
    double sum = 0;
    for (int64_t first = 0; first < plan.rows; first += plan.block_rows) {
      const int64_t count = std::min(plan.block_rows, plan.rows - first);
      const float *w = weight + head * plan.rows + first;
      soft_load(plan, *x, weight, head, first, count, rows.get());
      soft_scores(plan, rows.get(), count, packed.get(), offset.get(), squared ? 2.0 : 1.0, 1.0 / temperature, scores.get());
      parallel_for(0, count, soft_grain(8 * plan.codes), [&](int64_t begin, int64_t end) {
        [[maybe_unused]] const FlushSubnormals flush;
        for (int64_t i = begin; i < end; ++i) {
          double z = 0, moment = 0;
          kernels.exponentials(scores.get() + i * plan.pitch, plan.padded_codes, &z, &moment);
          factors.get()[i] = static_cast<float>(static_cast<double>(w[i]) / z);
          own[i] = std::log(z) - moment / z;  // both terms are not negative: nothing cancels
        }
      });
      for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(w[i]) * own[i];
      parallel_for(0, plan.panels, soft_grain(width * count), [&](int64_t begin, int64_t end) {
        [[maybe_unused]] const FlushSubnormals flush;
        for (int64_t panel = begin; panel < end; ++panel)
          kernels.columns(scores.get() + panel * width, plan.pitch, count, factors.get(), total.get() + panel * width);
      });
    }
    entropy[head] = static_cast<float>(sum);
    for (int64_t k = 0; k < plan.codes; ++k) usage[head * plan.codes + k] = static_cast<float>(total[k]);
  }
  return VQK_OK;
}
