// ema_update: moving averages of the codebook statistics and the codes that follow from them, one pass over the state.
#include <cmath>

#include "cpu/elements.h"

namespace vqk {
namespace {

// Sum of squares in eight lanes: a fixed order, whatever the vector width.
double square_sum(const float *x, int64_t count) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) lane[j] += static_cast<double>(x[i + j]) * x[i + j];
  for (; i < count; ++i) lane[i % 8] += static_cast<double>(x[i]) * x[i];
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

}  // namespace
}  // namespace vqk

int32_t vqk_cpu_ema_update(float *cluster_size, float *embed_avg, float *codebook, const float *counts, const float *sums,
                           int64_t heads, int64_t num_codes, int64_t dim, double decay, double eps, int32_t normalize) {
  using namespace vqk;
  const auto totals = allocate<double>(heads);
  if (!totals) return out_of_memory("ema_update");
  const float keep = static_cast<float>(decay), take = static_cast<float>(1.0 - decay);

  // One head, one thread: the order of this sum must not depend on the number of threads.
  parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      double total = 0;
      for (int64_t i = h * num_codes; i < (h + 1) * num_codes; ++i) {
        cluster_size[i] = keep * cluster_size[i] + take * counts[i];
        total += cluster_size[i];
      }
      totals[h] = total;
    }
  });

  parallel_for(0, heads * num_codes, row_grain(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double total = totals[i / num_codes], denominator = total + static_cast<double>(num_codes) * eps;
      const float smoothed =
          denominator == 0 ? 0.0f : static_cast<float>((static_cast<double>(cluster_size[i]) + eps) / denominator * total);
      float *average = embed_avg + i * dim, *code = codebook + i * dim;
      const float *sum = sums + i * dim;
      for (int64_t d = 0; d < dim; ++d) average[d] = keep * average[d] + take * sum[d];
      if (smoothed == 0) continue;
      for (int64_t d = 0; d < dim; ++d) code[d] = average[d] / smoothed;
      if (!normalize) continue;
      const float norm = std::max(static_cast<float>(std::sqrt(square_sum(code, dim))), 1e-12f);
      for (int64_t d = 0; d < dim; ++d) code[d] /= norm;
    }
  });
  return VQK_OK;
}
