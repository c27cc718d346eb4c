// What both libraries export alike: their version, their compiler, and the last error of a thread.
#include <cstdarg>
#include <cstdio>

#include "common.h"

namespace vqk {
namespace {
thread_local char last_error[512];
}  // namespace

int32_t fail(int32_t status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace vqk

int32_t vqk_abi_version(void) { return VQK_ABI_VERSION; }
const char *vqk_last_error(void) { return vqk::last_error; }

const char *vqk_build_info(void) {
#if defined(VQK_CUDA_VERSION)
  return "nvcc " VQK_CUDA_VERSION " for " VQK_CUDA_ARCHS;
#elif defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown compiler";
#endif
}
