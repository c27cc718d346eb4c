// The part of the CUDA runtime that csrc/cuda calls, for a GPU that is machine.h's: nvcc's output, linked with this in place of
// libcudart, runs on the host. Kernels run to their end when they are launched, on one thread at a time; streams are ignored.
//
// What a launch may not do on a GPU, it may not do here: more than 48 KB of dynamic shared memory that were not asked for, more
// threads than a kernel was compiled for, more blocks of a cooperative launch than are resident.
#include <cuda_runtime_api.h>
#include <fatbinary_section.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "machine.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int multiprocessors = 132, most_warps = 64, most_blocks = 32;  // an H100's
constexpr size_t plain_shared = 48 * 1024, reserved_shared = 1024;

// The PTX in a fat binary, which nvcc was told not to compress. Headers are those that CUDA's fatbinary writes.
std::string text_of(const void *fat_binary) {
  struct Header {
    uint32_t magic;
    uint16_t version, bytes;
    uint64_t size;
  };
  struct Entry {
    uint16_t kind, version;
    uint32_t bytes;
    uint64_t size;
    uint32_t compressed;
  };
  constexpr uint16_t ptx = 1;
  const auto *wrapper = static_cast<const __fatBinC_Wrapper_t *>(fat_binary);
  const auto *at = reinterpret_cast<const char *>(wrapper->data);
  Header header;
  std::memcpy(&header, at, sizeof header);
  if (wrapper->magic != FATBINC_MAGIC || header.magic != 0xBA55ED50) throw std::runtime_error("not a fat binary");
  at += header.bytes;
  for (const char *const end = at + header.size; at < end;) {
    Entry entry;
    std::memcpy(&entry, at, sizeof entry);
    const char *const payload = at + entry.bytes;
    if (entry.kind == ptx && entry.compressed == 0) return std::string(payload, strnlen(payload, entry.size));
    at = payload + entry.size;
  }
  throw std::runtime_error("no uncompressed PTX in the fat binary");
}

// One source file's kernels. Their text is read when the first of them is needed.
struct Binary {
  const void *fat_binary;
  std::unique_ptr<ptx::Module> module;
};

struct Kernel {
  Binary &binary;
  std::string name;
  size_t dynamic_shared = 0;  // granted by cudaFuncSetAttribute
  uint64_t launches = 0, programmatic = 0;

  ptx::Module &module() {
    if (!binary.module) binary.module = std::make_unique<ptx::Module>(text_of(binary.fat_binary));
    return *binary.module;
  }
  const ptx::Function &function() { return module().function(name); }
  size_t allowed() { return std::max(dynamic_shared, plain_shared - function().shared); }
};

// Filled before main, used until after it: never destroyed.
struct Runtime {
  std::mutex mutex;
  std::unordered_map<const void *, Kernel> kernels;  // by the address of their host function
  size_t shared_limit = 227 * 1024;
};

Runtime &runtime() {
  static auto *const runtime = new Runtime;
  return *runtime;
}

struct Failure {
  cudaError_t status;
  std::string why;
};
thread_local Failure last{cudaSuccess, ""};

// For vqk_last_error(), which has room for 512 bytes: where it happened is at the start, why at the end.
std::string shortened(const std::string &text) {
  return text.size() < 420 ? text : text.substr(0, 220) + " [...] " + text.substr(text.size() - 190);
}

// Runs a function of the API; what it throws is the last error.
template <class Body>
cudaError_t guarded(const Body &body) {
  const std::lock_guard<std::mutex> lock(runtime().mutex);
  try {
    body();
    return cudaSuccess;
  } catch (const Failure &e) {
    last = e;
  } catch (const std::exception &e) {
    last = {cudaErrorLaunchFailure, shortened(e.what())};
  }
  return last.status;
}

Kernel &kernel_at(const void *function) {
  const auto found = runtime().kernels.find(function);
  if (found == runtime().kernels.end()) throw Failure{cudaErrorInvalidDeviceFunction, "not a kernel of this library"};
  return found->second;
}

int blocks_per_multiprocessor(Kernel &kernel, unsigned threads, size_t dynamic_shared) {
  const size_t shared = (kernel.function().shared + dynamic_shared + 127) / 128 * 128 + reserved_shared;
  const size_t by_shared = (runtime().shared_limit + reserved_shared) / shared;
  return static_cast<int>(std::min<size_t>({by_shared, most_warps / ((threads + 31) / 32), most_blocks}));
}

void launch(Kernel &kernel, dim3 grid, dim3 block, size_t dynamic_shared, void *const *arguments, ptx::Attributes attributes) {
  const ptx::Function &function = kernel.function();
  const auto refuse = [&](cudaError_t status, const std::string &why) { throw Failure{status, kernel.name + ": " + why}; };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > static_cast<uint64_t>(function.max_threads) || block.z > 64)
    refuse(cudaErrorInvalidValue,
           std::to_string(threads) + " threads in a block of at most " + std::to_string(function.max_threads));
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    refuse(cudaErrorInvalidValue,
           "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
  if (dynamic_shared > kernel.allowed())
    refuse(cudaErrorInvalidValue, std::to_string(dynamic_shared) + " bytes of dynamic shared memory, " +
                                      std::to_string(kernel.allowed()) + " are allowed");
  const uint64_t resident = static_cast<uint64_t>(multiprocessors) * static_cast<uint64_t>(blocks_per_multiprocessor(
                                                                         kernel, static_cast<unsigned>(threads), dynamic_shared));
  if (attributes.cooperative && blocks > resident)
    refuse(cudaErrorCooperativeLaunchTooLarge, std::to_string(blocks) + " blocks, of which " + std::to_string(resident) + " fit");
  if (attributes.programmatic && kernel.module().capability() < 90)
    refuse(cudaErrorNotSupported, "programmatic launches are for GPUs from sm_90 on");
  ++kernel.launches;
  kernel.programmatic += attributes.programmatic;
  const uint32_t grid_size[3] = {grid.x, grid.y, grid.z}, block_size[3] = {block.x, block.y, block.z};
  ptx::set_shared_limit(runtime().shared_limit);
  ptx::launch(kernel.module(), kernel.name, grid_size, block_size, dynamic_shared, arguments, attributes);
}

}  // namespace

// ---- what nvcc's code calls before main ----

extern "C" {

void **__cudaRegisterFatBinary(void *fat_binary) { return reinterpret_cast<void **>(new Binary{fat_binary, nullptr}); }

void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}  // at the end of the process

void __cudaRegisterFunction(void **binary, const char *function, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *,
                            int *) {
  runtime().kernels.emplace(function, Kernel{*reinterpret_cast<Binary *>(binary), name});
}

// ---- launches ----

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return guarded([&] { *kernel = reinterpret_cast<cudaKernel_t>(&kernel_at(function)); });
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t) {
  return guarded([&] { launch(*reinterpret_cast<Kernel *>(kernel), grid, block, shared, arguments, {}); });
}

// Of `kernel<<<...>>>()`, which the library has nowhere: every stub refers to it nevertheless.
cudaError_t __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return cudaErrorMissingConfiguration; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  return guarded([&] {
    ptx::Attributes attributes;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
      const cudaLaunchAttribute &given = config->attrs[i];
      if (given.id == cudaLaunchAttributeCooperative)
        attributes.cooperative = given.val.cooperative != 0;
      else if (given.id == cudaLaunchAttributeProgrammaticStreamSerialization)
        attributes.programmatic = given.val.programmaticStreamSerializationAllowed != 0;
      else
        throw Failure{cudaErrorNotSupported, "launch attribute " + std::to_string(given.id)};
    }
    launch(kernel_at(function), config->gridDim, config->blockDim, config->dynamicSmemBytes, arguments, attributes);
  });
}

cudaError_t cudaFuncSetAttribute(const void *function, cudaFuncAttribute attribute, int value) {
  return guarded([&] {
    Kernel &kernel = kernel_at(function);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
      throw Failure{cudaErrorNotSupported, "function attribute " + std::to_string(attribute)};
    if (value < 0 || static_cast<size_t>(value) + kernel.function().shared > runtime().shared_limit)
      throw Failure{cudaErrorInvalidValue,
                    kernel.name + ": a block has " + std::to_string(runtime().shared_limit) + " bytes of shared memory at most"};
    kernel.dynamic_shared = static_cast<size_t>(value);
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *function) {
  return guarded([&] {
    *attributes = {};
    attributes->ptxVersion = attributes->binaryVersion = kernel_at(function).module().capability();
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared,
                                                                   unsigned) {
  return guarded([&] { *blocks = blocks_per_multiprocessor(kernel_at(function), static_cast<unsigned>(threads), shared); });
}

// ---- the device ----

cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return guarded([&] {
    if (device != 0) throw Failure{cudaErrorInvalidDevice, "there is one device, 0"};
  });
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
  return guarded([&] {
    if (device != 0) throw Failure{cudaErrorInvalidDevice, "there is one device, 0"};
    // That which all kernels are compiled for: sm_80, sm_90a.
    const int capability = runtime().kernels.begin()->second.module().capability();
    if (attribute == cudaDevAttrComputeCapabilityMajor)
      *value = capability / 10;
    else if (attribute == cudaDevAttrComputeCapabilityMinor)
      *value = capability % 10;
    else
      throw Failure{cudaErrorNotSupported, "device attribute " + std::to_string(attribute)};
  });
}

cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

// Asked for right after a failure, for what happened then.
const char *cudaGetErrorString(cudaError_t) { return last.why.c_str(); }

}  // extern "C"

// ---- for tests ----

API void vqk_cuda_host_seed(uint64_t seed) { ptx::set_seed(seed); }
API void vqk_cuda_ptx_races(int on) { ptx::set_races(on != 0); }
API int64_t vqk_cuda_host_launches() { return static_cast<int64_t>(ptx::counts().launches); }
API void vqk_cuda_host_shared(uint64_t bytes) { runtime().shared_limit = bytes; }

// As ptx_global() of api.cpp.
API void vqk_cuda_ptx_global(const uint64_t *ranges, uint64_t count) {
  std::vector<ptx::Range> all(count);
  for (size_t k = 0; k < count; ++k) all[k] = {ranges[2 * k], ranges[2 * k + 1]};
  ptx::set_global(std::move(all));
}

// A line for every kernel of the library: how often it was launched, how often so that it might overlap, and its name.
API const char *vqk_cuda_ptx_kernels() {
  static std::string lines;
  lines.clear();
  for (const auto &[function, kernel] : runtime().kernels)
    lines += std::to_string(kernel.launches) + " " + std::to_string(kernel.programmatic) + " " + kernel.name + "\n";
  return lines.c_str();
}
