// Which devices the library's kernels run on.
#include "cuda/runtime.cuh"

#if defined(__CUDACC__)

#if defined(VQK_CUDA_EMULATED)  // tests/gpu_free/ptx: nvcc's PTX, executed on the host
int32_t vqk_cuda_host_executed(void) { return 1; }
#else
int32_t vqk_cuda_host_executed(void) { return 0; }
#endif

int32_t vqk_cuda_device_status(int32_t device) {
  using namespace vqk;
  int driver = 0, runtime = 0, major = 0, minor = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  // CUDA's minor versions are compatible, its major ones are not.
  if (driver / 1000 < runtime / 1000)
    return fail(VQK_UNSUPPORTED, "the driver is for CUDA %d.%d, this library was built with CUDA %d.%d", driver / 1000,
                driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return fail(VQK_UNSUPPORTED, "CUDA device %d: %s", device, cudaGetErrorString(error));
  if (major < 8) return fail(VQK_UNSUPPORTED, "CUDA device %d has compute capability %d.%d, 8.0 is needed", device, major, minor);
  return VQK_OK;
}

#else

int32_t vqk_cuda_host_executed(void) { return 1; }
int32_t vqk_cuda_device_status(int32_t) { return VQK_OK; }
// The tests' own: another order of execution, another GPU's shared memory, a count (host_execution.h). Not part of the C ABI.
VQK_API void vqk_cuda_host_seed(uint64_t seed) { vqk::host::set_seed(seed); }
VQK_API int64_t vqk_cuda_host_launches(void) { return vqk::host::launches(); }
VQK_API void vqk_cuda_host_shared(uint64_t bytes) { vqk::host::set_shared_limit(bytes); }

#endif
