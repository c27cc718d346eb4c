#include "common.h"
int32_t vqk_cpu_codebook_sum(const vqk_rows *, const int64_t *, int64_t, void *, float *) { return vqk::fail(VQK_UNSUPPORTED, "not built yet"); }
