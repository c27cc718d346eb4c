// The borrowed thread pool, and which instruction sets this machine runs.
#include "common.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vqk {
namespace {

vqk_parallel_for installed_parallel_for = nullptr;
thread_local int32_t threads = 1;

#if defined(__x86_64__)
bool is_amd() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ebx == 0x68747541;  // "Auth"enticAMD
}
#endif

// The kernel grants the 8 KB of tile state per process, on request.
[[maybe_unused]] bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool tile = (edx >> 24) & 1, bf16 = (edx >> 22) & 1;
  if (!tile || !bf16) return false;
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}

bool has_isa(int32_t isa) {
  switch (isa) {
    case VQK_SCALAR: return true;
#if defined(VQK_HAVE_AVX2)
    case VQK_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(VQK_HAVE_AVX512)
    case VQK_AVX512:
      return has_isa(VQK_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(VQK_HAVE_AVX512BF16)
    case VQK_AVX512BF16: return has_isa(VQK_AVX512) && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(VQK_HAVE_AMX)
    case VQK_AMX: {
      static const bool granted = amx_granted();
      return granted && has_isa(VQK_AVX512BF16);
    }
#endif
#if defined(VQK_HAVE_NEON)
    case VQK_NEON: return true;  // every aarch64 has it
#endif
    default: return false;
  }
}

int32_t best_isa() {
  if (has_isa(VQK_AMX)) return VQK_AMX;
  if (has_isa(VQK_NEON)) return VQK_NEON;
#if defined(__x86_64__)
  // VDPBF16PS has twice the FMA rate on Zen 4 and later, half of it on Intel (measured: 116 against 227 GFLOP/s).
  if (has_isa(VQK_AVX512BF16) && is_amd()) return VQK_AVX512BF16;
#endif
  if (has_isa(VQK_AVX512)) return VQK_AVX512;
  return has_isa(VQK_AVX2) ? VQK_AVX2 : VQK_SCALAR;
}

}  // namespace

void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, vqk_parallel_body body, void *context) {
  if (begin >= end) return;
  if (installed_parallel_for == nullptr || threads == 1 || end - begin <= grain)
    body(begin, end, context);
  else
    installed_parallel_for(begin, end, grain, body, context);
}

int num_threads() { return installed_parallel_for == nullptr ? 1 : threads; }

}  // namespace vqk

void vqk_cpu_set_parallel_for(vqk_parallel_for parallel_for) { vqk::installed_parallel_for = parallel_for; }
void vqk_cpu_set_num_threads(int32_t num_threads) { vqk::threads = num_threads < 1 ? 1 : num_threads; }
int32_t vqk_cpu_has_isa(int32_t isa) { return vqk::has_isa(isa) ? 1 : 0; }

int32_t vqk_cpu_best_isa(void) {
  static const int32_t best = vqk::best_isa();
  return best;
}
