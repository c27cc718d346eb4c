// The host half of portable.cuh: CUDA's names for a C++17 compiler, and the waits that hand over to another fibre.
//
// Included by portable.cuh only. host_execution.cpp holds the scheduler; nothing here is in an installed library.
#ifndef VQK_CUDA_HOST_EXECUTION_H
#define VQK_CUDA_HOST_EXECUTION_H

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <type_traits>
#include <utility>

#include "common.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define VQK_DEVICE [[maybe_unused]] static inline

struct uint3 {
  uint32_t x, y, z;
};
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
  constexpr dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define VQK_VECTOR(scalar, name, bytes)                                           \
  struct alignas(bytes) name##2 { scalar x, y; };                                 \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }            \
  struct alignas(2 * bytes > 16 ? 16 : 2 * bytes) name##4 { scalar x, y, z, w; }; \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
VQK_VECTOR(float, float, 8)
VQK_VECTOR(int32_t, int, 8)
VQK_VECTOR(uint32_t, uint, 8)
VQK_VECTOR(double, double, 16)
#undef VQK_VECTOR

namespace vqk {
namespace host {

struct Ids {
  uint3 thread, block;
  dim3 threads, blocks;
};
inline thread_local Ids ids;  // of the fibre that runs

// Orders of execution: 0 is ascending, every other seed another mixture of random, eager and starving ones.
void set_seed(uint64_t seed);
// How many kernels have been started.
int64_t launches();
// Bytes of shared memory that a block may have, 227 KB at first; launches that want more fail.
void set_shared_limit(size_t bytes);

// Stops this fibre and the launch, which returns VQK_INTERNAL with the message. Does not return.
[[noreturn]] void error(const char *format, ...) __attribute__((format(printf, 1, 2)));

void *shared_memory(size_t bytes);
void barrier(int id, int threads, bool wait, const char *what);

// A value from every lane of `mask`, which all call it for the same `what`. Of others, the entry is undefined.
constexpr int lane_bytes = 256;
const unsigned char *exchange_bytes(uint32_t mask, const char *what, const void *value, size_t bytes);

template <class T>
struct Lanes {
  const unsigned char *data;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, data + lane * lane_bytes, sizeof value);
    return value;
  }
};
// Valid until this lane exchanges again.
template <class T>
Lanes<T> exchange(uint32_t mask, const char *what, const T &value) {
  static_assert(sizeof(T) <= lane_bytes && std::is_trivially_copyable<T>::value, "a small plain value");
  return {exchange_bytes(mask, what, &value, sizeof value)};
}

// Work that may happen any time between issue() and the wait() of its group; per thread, `queue` 0 is cp.async's,
// 1 is for matrix products.
void issue(int queue, std::function<void()> work);
void commit(int queue);
void wait(int queue, int groups);

// Work of the copy engine: happens when the scheduler says so.
void engine(std::function<void()> work);

// Waits until wake(key); the caller checks its condition again.
void sleep(const void *key, const char *what);
void wake(const void *key);

// Waits for all threads of a cooperative launch.
void grid_barrier();

// A thread that ends without it is an error.
void start_kernel();

int32_t run(const char *what, dim3 grid, dim3 block, size_t shared, bool cooperative, const std::function<void()> &body);

}  // namespace host

struct Launch {
  dim3 grid, block;
  size_t shared;
  void *stream;
  bool cooperative = false;
};

template <class... Parameters, class... Arguments>
int32_t launch(const char *what, void (*kernel)(Parameters...), const Launch &how, Arguments... arguments) {
  return host::run(what, how.grid, how.block, how.shared, how.cooperative,
                   [&] { kernel(static_cast<Parameters>(arguments)...); });
}

// Two blocks fit on each multiprocessor.
template <class... Parameters>
int32_t resident_blocks(const char *, void (*)(Parameters...), int, size_t, int multiprocessors, int *blocks) {
  *blocks = 2 * multiprocessors;
  return VQK_OK;
}

template <class T>
T &shared_memory() {
  static_assert(std::is_trivially_destructible<T>::value, "shared memory has no destructors");
  return *static_cast<T *>(host::shared_memory(sizeof(T)));
}

inline int lane() { return static_cast<int>(host::ids.thread.x & 31); }
inline int warp() { return static_cast<int>(host::ids.thread.x >> 5); }

inline void barrier_sync(int id, int threads) { host::barrier(id, threads, true, "barrier_sync"); }
inline void grid_barrier() { host::grid_barrier(); }
inline void start_kernel() { host::start_kernel(); }
inline void barrier_arrive(int id, int threads) { host::barrier(id, threads, false, "barrier_arrive"); }

inline void check_aligned(const void *pointer, size_t bytes, const char *what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) host::error("%s: %p is not aligned to %zu bytes", what, pointer, bytes);
}

template <int bytes>
void copy_async(void *shared, const void *global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  check_aligned(shared, bytes, "copy_async");
  check_aligned(global, bytes, "copy_async");
  host::issue(0, [=] {
    if (valid)
      std::memcpy(shared, global, bytes);
    else
      std::memset(shared, 0, bytes);
  });
}
inline void copy_commit() { host::commit(0); }
template <int groups>
void copy_wait() {
  host::wait(0, groups);
}

struct Mbarrier {
  uint64_t word;  // of which: phase 1 bit, count 15, arrivals that are missing 15, bytes that are missing 32 (signed)

  void init(uint32_t count) {
    if (count == 0 || count > 0x7fff) host::error("Mbarrier::init(%u): expected 1 to 32767", count);
    set(0, count, count, 0);
  }
  void arrive() { step(1, 0, 0); }
  void arrive_expect(uint32_t bytes) { step(1, bytes, 0); }
  void complete(uint32_t bytes) { step(0, 0, bytes); }
  void wait(uint32_t parity) {
    while ((word & 1) == (parity & 1)) host::sleep(this, "Mbarrier::wait");
  }
  bool wait_briefly(uint32_t parity) {
    wait(parity);
    return true;
  }

 private:
  void set(uint64_t phase, uint64_t count, uint64_t missing, int32_t bytes) {
    word = phase | count << 1 | missing << 16 | static_cast<uint64_t>(static_cast<uint32_t>(bytes)) << 32;
  }
  void step(uint32_t arrivals, uint32_t expected, uint32_t copied) {
    const uint64_t count = word >> 1 & 0x7fff, missing = word >> 16 & 0x7fff;
    const int32_t bytes =
        static_cast<int32_t>(static_cast<uint32_t>(word >> 32)) + static_cast<int32_t>(expected) - static_cast<int32_t>(copied);
    if (missing < arrivals) host::error("Mbarrier: more arrivals than the %d of a phase", static_cast<int>(count));
    if (missing == arrivals && bytes == 0) {
      set(word & 1 ? 0 : 1, count, count, 0);
      host::wake(this);
    } else {
      set(word & 1, count, missing - arrivals, bytes);
    }
  }
};

inline void fence_mbarrier_init() {}
inline void fence_async_proxy() {}

inline void bulk_copy(void *shared, const void *global, uint32_t bytes, Mbarrier &barrier) {
  check_aligned(shared, 16, "bulk_copy");
  check_aligned(global, 16, "bulk_copy");
  if (bytes == 0 || bytes % 16 != 0) host::error("bulk_copy of %u bytes: expected a multiple of 16", bytes);
  Mbarrier *done = &barrier;
  host::engine([=] {
    std::memcpy(shared, global, bytes);
    done->complete(bytes);
  });
}

template <int registers>
void give_registers() {}
template <int registers>
void take_registers() {}

inline float half_to_float(uint16_t bits) { return f16_to_float(bits); }
inline uint16_t float_to_half(float value) { return float_to_f16(value); }

using std::max;
using std::min;

}  // namespace vqk

#define threadIdx (::vqk::host::ids.thread)
#define blockIdx (::vqk::host::ids.block)
#define blockDim (::vqk::host::ids.threads)
#define gridDim (::vqk::host::ids.blocks)

inline void __syncthreads() { vqk::host::barrier(0, 0, true, "__syncthreads"); }
inline void __syncwarp(uint32_t mask = ~0u) { vqk::host::exchange(mask, "__syncwarp", 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { vqk::host::error("__trap()"); }

// Of each shuffle: the lane that is read, within groups of `width`.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int self = vqk::lane();
  return vqk::host::exchange(mask, "__shfl_sync", value)[(self & ~(width - 1)) | (source & (width - 1))];
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int self = vqk::lane(), source = self ^ bits;
  const auto all = vqk::host::exchange(mask, "__shfl_xor_sync", value);
  return source / width > self / width ? value : all[source];
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int self = vqk::lane(), source = self + static_cast<int>(delta);
  const auto all = vqk::host::exchange(mask, "__shfl_down_sync", value);
  return source / width == self / width && source < 32 ? all[source] : value;
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int self = vqk::lane(), source = self - static_cast<int>(delta);
  const auto all = vqk::host::exchange(mask, "__shfl_up_sync", value);
  return source >= (self & ~(width - 1)) ? all[source] : value;
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const auto all = vqk::host::exchange(mask, "__ballot_sync", predicate);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && all[i] != 0) bits |= 1u << i;
  return bits;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value) {
  const auto all = vqk::host::exchange(mask, "__match_any_sync", value);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && all[i] == value) bits |= 1u << i;
  return bits;
}
#define VQK_REDUCE(name, expression)                                     \
  template <class T>                                                     \
  T name(uint32_t mask, T value) {                                       \
    static_assert(sizeof(T) == 4 && std::is_integral<T>::value, "ints"); \
    const auto all = vqk::host::exchange(mask, #name, value);            \
    T result = value;                                                    \
    for (int i = 0; i < 32; ++i) {                                       \
      if (!(mask >> i & 1) || i == vqk::lane()) continue;                \
      const T other = all[i];                                            \
      result = static_cast<T>(expression);                               \
    }                                                                    \
    return result;                                                       \
  }
VQK_REDUCE(__reduce_add_sync, static_cast<uint32_t>(result) + static_cast<uint32_t>(other))
VQK_REDUCE(__reduce_min_sync, std::min(result, other))
VQK_REDUCE(__reduce_max_sync, std::max(result, other))
VQK_REDUCE(__reduce_or_sync, result | other)
VQK_REDUCE(__reduce_and_sync, result &other)
#undef VQK_REDUCE

// Integers only, see portable.cuh. Fibres change at waits alone, so plain code is atomic.
#define VQK_ATOMIC(name, expression)                               \
  template <class T>                                               \
  T name(T *address, std::common_type_t<T> value) {                \
    static_assert(std::is_integral<T>::value, "no float atomics"); \
    const T old = *address;                                        \
    *address = static_cast<T>(expression);                         \
    return old;                                                    \
  }
VQK_ATOMIC(atomicAdd, static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value))
VQK_ATOMIC(atomicMin, std::min(old, value))
VQK_ATOMIC(atomicMax, std::max(old, value))
VQK_ATOMIC(atomicOr, old | value)
VQK_ATOMIC(atomicAnd, old &value)
VQK_ATOMIC(atomicExch, value)
#undef VQK_ATOMIC
template <class T>
T atomicCAS(T *address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

template <class T>
T __ldg(const T *pointer) {
  return *pointer;
}

// Rounded to nearest, never contracted: the host's build has -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
inline uint32_t __float_as_uint(float a) { return vqk::float_to_bits(a); }
inline float __uint_as_float(uint32_t a) { return vqk::bits_to_float(a); }
inline int32_t __float_as_int(float a) { return static_cast<int32_t>(vqk::float_to_bits(a)); }
inline float __int_as_float(int32_t a) { return vqk::bits_to_float(static_cast<uint32_t>(a)); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(bits)); }

#endif
