#include "common.h"
int32_t vqk_cpu_quantize_grad(const vqk_rows *, const vqk_rows *, const vqk_codes *, const int64_t *, double, int32_t, const vqk_rows *) { return vqk::fail(VQK_UNSUPPORTED, "not built yet"); }
