#include "common.h"
int32_t vqk_cpu_ema_update(float *, float *, float *, const float *, const float *, int64_t, int64_t, int64_t, double, double, int32_t) { return vqk::fail(VQK_UNSUPPORTED, "not built yet"); }
