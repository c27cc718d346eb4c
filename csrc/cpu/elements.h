// How the kernels around the search see memory: dtypes as types, checked indices, allocation that does not throw.
#ifndef VQK_CPU_ELEMENTS_H
#define VQK_CPU_ELEMENTS_H

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "common.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

// One build per vector width, chosen when the library is loaded. Contraction is off and every order of summation is
// spelled out, so all of them give the same bits. Sanitizers and loaders without ifunc (musl, macOS) take the baseline.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#if __GNUC__ >= 12
#define VQK_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
#endif
#if !defined(VQK_CLONES)
#define VQK_CLONES
#endif

namespace vqk {

// One type per dtype: `raw` is what lies in memory, `value` what arithmetic uses.
struct F32 {
  using raw = float;
  using value = float;
  static float get(float v) { return v; }
  template <class V>
  static float put(V v) {
    return static_cast<float>(v);
  }
};

struct F64 {
  using raw = double;
  using value = double;
  static double get(double v) { return v; }
  template <class V>
  static double put(V v) {
    return v;
  }
};

struct F16 {
  using raw = uint16_t;
  using value = float;
  static float get(uint16_t v) { return f16_to_float(v); }
  template <class V>
  static uint16_t put(V v) {
    return float_to_f16(static_cast<float>(v));
  }
};

struct BF16 {
  using raw = uint16_t;
  using value = float;
  static float get(uint16_t v) { return bf16_to_float(v); }
  template <class V>
  static uint16_t put(V v) {
    return float_to_bf16(static_cast<float>(v));
  }
};

// Calls f with the type of a vqk_dtype.
template <class F>
auto with_dtype(int32_t dtype, const F &f) {
  switch (dtype) {
    case VQK_F32: return f(F32{});
    case VQK_F64: return f(F64{});
    case VQK_F16: return f(F16{});
    default: return f(BF16{});
  }
}

// nullptr instead of an exception: none may cross the C ABI.
template <class T>
std::unique_ptr<T[]> allocate(int64_t count) {
  return std::unique_ptr<T[]>(new (std::nothrow) T[static_cast<size_t>(std::max<int64_t>(count, 1))]);
}

inline int32_t out_of_memory(const char *op) { return fail(VQK_NO_MEMORY, "%s: out of memory", op); }

// The first index outside [-1, K), whichever thread meets it.
class IndexCheck {
 public:
  explicit IndexCheck(int64_t num_codes) : codes_(static_cast<uint64_t>(num_codes)) {}

  bool ok(int64_t index, int64_t position) {
    if (static_cast<uint64_t>(index) + 1 <= codes_) return true;
    int64_t seen = first_.load(std::memory_order_relaxed);
    while (position < seen && !first_.compare_exchange_weak(seen, position, std::memory_order_relaxed)) {
    }
    return false;
  }

  int32_t status(const char *op, const int64_t *indices) const {
    const int64_t position = first_.load();
    if (position == INT64_MAX) return VQK_OK;
    return fail(VQK_INVALID, "%s: indices contains %" PRId64 ", expected -1 or a code in [0, %" PRIu64 ")", op, indices[position],
                codes_);
  }

 private:
  uint64_t codes_;
  std::atomic<int64_t> first_{INT64_MAX};
};

// (H, N, 1, D) is the same rows as (H, 1, N, D): blocks of rows run along S, so let it be the long one.
inline vqk_rows with_long_rows(vqk_rows rows) {
  if (rows.size[2] == 1) {
    std::swap(rows.size[1], rows.size[2]);
    std::swap(rows.stride[1], rows.stride[2]);
  }
  return rows;
}

template <class T>
const typename T::raw *pointer(const void *data) {
  return static_cast<const typename T::raw *>(data);
}

template <class T>
typename T::raw *pointer(void *data) {
  return static_cast<typename T::raw *>(data);
}

// to[j * to_step + i] = from[i * width + j] for i < count, j < width: floats in registers, four by four.
template <int64_t count, int64_t width, class V>
VQK_INLINE void transpose(const V *__restrict from, V *__restrict to, int64_t to_step) {
  static_assert(count % 4 == 0 && width % 4 == 0, "no remainders");
#if defined(__SSE2__)
  if constexpr (std::is_same<V, float>::value) {
    for (int64_t i = 0; i < count; i += 4)
      for (int64_t j = 0; j < width; j += 4) {
        const float *in = from + i * width + j;
        __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + width), c = _mm_loadu_ps(in + 2 * width),
               d = _mm_loadu_ps(in + 3 * width);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        float *out = to + j * to_step + i;
        _mm_storeu_ps(out, a);
        _mm_storeu_ps(out + to_step, b);
        _mm_storeu_ps(out + 2 * to_step, c);
        _mm_storeu_ps(out + 3 * to_step, d);
      }
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; ++j) to[j * to_step + i] = from[i * width + j];
}

// Rows per work item, so that one is worth handing to another thread.
inline int64_t row_grain(int64_t dim) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(dim, 1)); }

}  // namespace vqk

#endif
