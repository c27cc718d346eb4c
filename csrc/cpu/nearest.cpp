// Interim: brute force in float64.
#include <cmath>
#include "common.h"
using namespace vqk;
int32_t vqk_cpu_nearest_fingerprint(const vqk_codes *, uint64_t *f) { f[0] = f[1] = 0; return 0; }
int64_t vqk_cpu_nearest_packed_bytes(const vqk_codes *, int32_t, int32_t) { return 64; }
int32_t vqk_cpu_nearest_pack(const vqk_codes *, int32_t, int32_t, void *) { return 0; }
int32_t vqk_cpu_nearest(const vqk_rows *x, const vqk_codes *c, int32_t metric, int32_t, int32_t, const void *, int64_t *indices, float *score) {
  const int64_t B = x->size[1], S = x->size[2], D = x->size[3], K = c->size[1];
  parallel_for(0, x->size[0] * B * S, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t h = n / (B * S), b = n / S % B, s = n % S;
      double best = INFINITY, first = 0; int64_t index = 0; bool any = false;
      for (int64_t k = 0; k < K; ++k) {
        double t = 0, q = 0;
        for (int64_t d = 0; d < D; ++d) {
          const double a = load_element(x->data, x->dtype, h * x->stride[0] + b * x->stride[1] + s * x->stride[2] + d * x->stride[3]);
          const double e = load_element(c->data, c->dtype, h * c->stride[0] + k * c->stride[1] + d * c->stride[2]);
          if (metric == VQK_L2) { const double f = a - e; t += f * f; } else { t += a * e; q += e * e; }
        }
        if (metric == VQK_COSINE) t = q > 0 ? t / std::sqrt(q) : 0 * t;
        if (metric != VQK_L2) t = -t;
        if (k == 0) first = t;
        if (t < best) { best = t; index = k; any = true; }
      }
      if (!any) best = first;
      indices[n] = index; score[n] = static_cast<float>(metric == VQK_L2 ? best : -best);
    }
  });
  return 0;
}
