// Around a call of the C ABI: the device it is for. Included by every csrc/cuda/<op>.cu.
#ifndef VQK_CUDA_RUNTIME_CUH
#define VQK_CUDA_RUNTIME_CUH

#include "cuda/portable.cuh"

namespace vqk {

// Makes `device` current until the end of the scope. The library has a CUDA runtime of its own (it is linked statically),
// so what is current for torch's is asked for and restored as if it were not.
class OnDevice {
 public:
  explicit OnDevice([[maybe_unused]] int32_t device) {
#if defined(__CUDACC__)
    cudaError_t error = cudaGetDevice(&previous_);
    if (error == cudaSuccess && previous_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
    if (error != cudaSuccess) status_ = fail(VQK_INTERNAL, "CUDA device %d: %s", device, cudaGetErrorString(error));
#endif
  }
  ~OnDevice() {
#if defined(__CUDACC__)
    if (changed_) cudaSetDevice(previous_);
#endif
  }
  OnDevice(const OnDevice &) = delete;
  OnDevice &operator=(const OnDevice &) = delete;
  int32_t status() const { return status_; }

 private:
  [[maybe_unused]] int previous_ = 0;
  [[maybe_unused]] bool changed_ = false;
  int32_t status_ = VQK_OK;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parts of a workspace, each 256-byte aligned. Without memory behind it, it only counts.
class Workspace {
 public:
  explicit Workspace(void *memory) : memory_(static_cast<char *>(memory)) {}
  template <class T>
  T *take(int64_t count) {
    char *part = memory_ + used_;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T *>(part);
  }
  int64_t bytes() const { return used_; }

 private:
  char *memory_;
  int64_t used_ = 0;
};

}  // namespace vqk

#endif
