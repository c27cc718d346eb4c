// What device code is written against: CUDA where nvcc compiles it, the same code as fibres where a C++17 compiler does.
//
// Kernels are CUDA: __global__, threadIdx, __syncthreads(), __shfl_xor_sync(), atomicAdd() on integers, __dmul_rn()... have
// their own names everywhere. What CUDA C++ has no plain name for is in namespace vqk, below: named barriers, cp.async,
// mbarrier, the bulk copies of Hopper's TMA. nvcc sees one instruction each. On the host (host_execution.h) a block runs as
// one fibre per thread, under ASan and UBSan, and every wait is a point where another thread may go on, in an order
// that a seed decides. So a barrier that is missing, an async copy that nobody waited for and a wait that never ends
// show up as wrong results or as an error that names the thread. Two rules make that possible:
//
//   * Shared memory is ONE struct per kernel, shared_memory<T>(), and the launch passes sizeof(T). It starts as 0xff bytes
//     (NaN) in every block, ends in a redzone, and its arrays know their bounds.
//   * Kernels are started by launch() and begin with start_kernel(). Threads wait only by calling what is listed here, never
//     by spinning on memory.
//     Blocks run one after another, so none may wait for another ("the last block does the rest" is fine), but for
//     grid_barrier() in a cooperative launch, whose blocks run in turns.
//
// Float atomics are missing on purpose: results must not depend on the order of threads. Something is missing? Add
// both halves here and in host_execution.h, and a line in tests/gpu_free/portable_selftest.cu.
//
//   struct Shared {                                            // what a block shares
//     float row[2][256];
//     vqk::Mbarrier full[2], empty[2];
//     double total[8];
//   };
//
//   __global__ void __launch_bounds__(288) sum_rows(const float *x, int rows, double *out) {   // 8 warps add, 1 warp loads
//     vqk::start_kernel();
//     Shared &shared = vqk::shared_memory<Shared>();
//     if (threadIdx.x == 0)
//       for (int i = 0; i < 2; ++i) shared.full[i].init(1), shared.empty[i].init(256);
//     vqk::fence_mbarrier_init();
//     __syncthreads();
//     if (threadIdx.x >= 256) {                                // producer: one thread keeps two rows in flight
//       if (threadIdx.x == 256)
//         for (int r = blockIdx.x, n = 0; r < rows; r += gridDim.x, ++n) {
//           if (n >= 2) shared.empty[n % 2].wait((n / 2 - 1) % 2);
//           shared.full[n % 2].arrive_expect(1024);
//           vqk::bulk_copy(shared.row[n % 2], x + r * 256, 1024, shared.full[n % 2]);
//         }
//       return;
//     }
//     for (int r = blockIdx.x, n = 0; r < rows; r += gridDim.x, ++n) {
//       shared.full[n % 2].wait(n / 2 % 2);
//       double sum = shared.row[n % 2][threadIdx.x];
//       shared.empty[n % 2].arrive();
//       for (int step = 16; step > 0; step /= 2) sum = __dadd_rn(sum, __shfl_xor_sync(~0u, sum, step));
//       if (vqk::lane() == 0) shared.total[threadIdx.x / 32] = sum;
//       vqk::barrier_sync(1, 256);                             // the producer is not asked
//       if (threadIdx.x == 0)
//         for (int i = 1; i < 8; ++i) shared.total[0] = __dadd_rn(shared.total[0], shared.total[i]);
//       if (threadIdx.x == 0) out[r] = shared.total[0];
//       vqk::barrier_sync(1, 256);
//     }
//   }
//   // on the host side: int32_t status = vqk::launch("sum_rows", sum_rows, {grid, 288, sizeof(Shared), stream}, x, rows, out);
//
// Warp-wide and warp-group-wide matrix products get their two halves beside the kernels that use them; for the host's,
// vqk::host::exchange() gathers a value from every lane and vqk::host::issue()/commit()/wait() defer work as the
// hardware may.
#ifndef VQK_CUDA_PORTABLE_CUH
#define VQK_CUDA_PORTABLE_CUH

#include "common.h"

#if !defined(__CUDACC__)
#include "cuda/host_execution.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#define VQK_DEVICE static __device__ __forceinline__

namespace vqk {

// Grid and block in threads; `shared` bytes of dynamic shared memory. Of a `cooperative` launch all blocks are resident at
// once, resident_blocks() at most, or it fails; it can be captured in a graph like any other (the attribute is valid
// for graph nodes).
struct Launch {
  dim3 grid, block;
  size_t shared;
  void *stream;
  bool cooperative = false;
};

inline int32_t allow_shared(const char *what, const void *kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return VQK_OK;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status == cudaSuccess) return VQK_OK;
  return fail(VQK_UNSUPPORTED, "%s: %zu bytes of shared memory: %s", what, bytes, cudaGetErrorString(status));
}

// Blocks of a kernel that the current device runs at once. The host asks the driver's tables, not the device.
template <class... Parameters>
int32_t resident_blocks(const char *what, void (*kernel)(Parameters...), int threads, size_t shared, int multiprocessors,
                        int *blocks) {
  if (const int32_t status = allow_shared(what, reinterpret_cast<const void *>(kernel), shared)) return status;
  const cudaError_t status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
  *blocks *= multiprocessors;
  return status == cudaSuccess ? int32_t{VQK_OK} : fail(VQK_INTERNAL, "%s: %s", what, cudaGetErrorString(status));
}

// Whether kernels of the current device may be started before the one in front of them has ended: if what runs there is compiled
// from PTX for 9.0 or later, for older start_kernel() below cannot wait. It can be forbidden, to rule it out as a cause.
inline bool overlaps(const void *kernel) {
  static const bool forbidden = [] {
    const char *value = std::getenv("VQKERNELS_CUDA_OVERLAP");
    return value != nullptr && std::strcmp(value, "0") == 0;
  }();
  static std::atomic<int> ptx_version[64];  // by device; one answer for all kernels, which are compiled alike
  int device = 0;
  if (forbidden || cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
  if (ptx_version[device] == 0) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
    ptx_version[device] = attributes.ptxVersion;
  }
  return ptx_version[device] >= 90;
}

// Starts a kernel on the current device; `what` names it in the error. Never waits.
template <class... Parameters, class... Arguments>
int32_t launch(const char *what, void (*kernel)(Parameters...), const Launch &how, Arguments... arguments) {
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return VQK_OK;
  if (const int32_t status = allow_shared(what, reinterpret_cast<const void *>(kernel), how.shared)) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute attribute{};
  if (how.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = how.cooperative || overlaps(reinterpret_cast<const void *>(kernel)) ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return status == cudaSuccess ? int32_t{VQK_OK} : fail(VQK_INTERNAL, "%s: %s", what, cudaGetErrorString(status));
}

// The first line of every kernel. From sm_90 on, a kernel's blocks may come to a multiprocessor while the one in front on the
// stream runs its last ones, which hides what a launch takes; here they wait until that one has ended and its writes are
// visible. It had waited for the one in front of it, so all earlier ones have ended as well.
VQK_DEVICE void start_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The block's shared memory, 1024-byte aligned as swizzled tiles want it.
template <class T>
VQK_DEVICE T &shared_memory() {
  extern __shared__ __align__(1024) unsigned char vqk_shared[];
  return *reinterpret_cast<T *>(vqk_shared);
}

// Waits for all threads of a cooperative launch; what they wrote before is visible after.
VQK_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

VQK_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31); }
VQK_DEVICE int warp() { return static_cast<int>(threadIdx.x >> 5); }

VQK_DEVICE uint32_t shared_address(const void *pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// Named barriers 1 to 15 (0 is __syncthreads) for `threads` threads, a multiple of 32.
VQK_DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
VQK_DEVICE void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// cp.async: 4, 8 or 16 aligned bytes from global to shared memory, zeros unless `valid`. Commit closes a group; wait<n>
// returns when at most the n youngest groups of this thread are under way. Other threads see them after a barrier.
template <int bytes>
VQK_DEVICE void copy_async(void *shared, const void *global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const uint32_t to = shared_address(shared);
  const int size = valid ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(size), "n"(bytes) : "memory");
}
VQK_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
VQK_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// mbarrier, in shared memory. A phase ends when `count` arrivals came and every expected byte was copied; wait(p) returns
// once the phase of parity p (0, 1, 0, ...) has ended.
struct Mbarrier {
  uint64_t word;

  __device__ __forceinline__ void init(uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(count) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(shared_address(&word)) : "memory");
  }
  // One arrival that also announces `bytes` of bulk copies.
  __device__ __forceinline__ void arrive_expect(uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(shared_address(&word)),
                 "r"(bytes)
                 : "memory");
#else
    __trap();
#endif
  }
  __device__ __forceinline__ void wait(uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n .reg .pred done;\n again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra again;\n}" ::"r"(
            shared_address(&word)),
        "r"(parity)
        : "memory");
#else
    __trap();
#endif
  }
  // The same, but false after some tenths of a second in vain: for tests.
  __device__ __forceinline__ bool wait_briefly(uint32_t parity) {
    uint32_t done = 0;
#if __CUDA_ARCH__ >= 900
    for (int i = 0; i < 1 << 20 && done == 0; ++i)
      asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, 100;\n selp.u32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(shared_address(&word)), "r"(parity)
                   : "memory");
#endif
    return done != 0;
  }
};

// After Mbarrier::init, before the barrier that lets other threads and copies use it.
VQK_DEVICE void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// Between ordinary accesses of shared memory and a bulk copy or matrix product of the same bytes: those go by the async proxy.
VQK_DEVICE void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// TMA without a tensor map: `bytes` (a multiple of 16) lie in a row on both sides, both 16-byte aligned. Started by one
// thread; completes on `barrier`. Tiles that packing wrote in the order of shared memory need nothing more.
VQK_DEVICE void bulk_copy(void *shared, const void *global, uint32_t bytes, Mbarrier &barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&barrier.word))
      : "memory");
#else
  __trap();
#endif
}

// Registers move from producers to consumers: by all warps of a warp group.
template <int registers>
VQK_DEVICE void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}
template <int registers>
VQK_DEVICE void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

// 16-bit floats travel as their bits, as in common.h, but by the hardware's conversions.
VQK_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
VQK_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

}  // namespace vqk

#endif
#endif
