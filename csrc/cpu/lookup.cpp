#include "common.h"
int32_t vqk_cpu_lookup(const vqk_codes *, const int64_t *, const vqk_rows *) { return vqk::fail(VQK_UNSUPPORTED, "not built yet"); }
