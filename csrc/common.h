// Shared by every translation unit, CUDA's included: dtypes, 16-bit conversions, errors, threads.
#ifndef VQK_COMMON_H
#define VQK_COMMON_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "capi.h"

// Internal linkage on purpose: files built for different instruction sets must never share an out-of-line copy.
#if defined(__CUDACC__)
#define VQK_INLINE static inline __host__ __device__ __attribute__((always_inline, unused))
#else
#define VQK_INLINE static inline __attribute__((always_inline, unused))
#endif

namespace vqk {

// Fills vqk_last_error() of this thread and returns `status`.
int32_t fail(int32_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// torch's pool through the installed callback, serial without one. `body(begin, end)` must not throw.
void parallel_for_raw(int64_t begin, int64_t end, int64_t grain, vqk_parallel_body body, void *context);
int num_threads();

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F &body) {
  parallel_for_raw(
      begin, end, grain, [](int64_t b, int64_t e, void *context) { (*static_cast<const F *>(context))(b, e); },
      const_cast<void *>(static_cast<const void *>(&body)));
}

VQK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

VQK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

VQK_INLINE float bf16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

// Round to nearest even; NaN stays NaN.
VQK_INLINE uint16_t float_to_bf16(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The 16-bit float conversions select instead of branching, so that loops over them vectorise.
VQK_INLINE float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  // Multiplying by 2^112 re-biases the exponent and normalises subnormals exactly.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
  return bits_to_float(sign | special | float_to_bits(scaled));
}

// Round to nearest even, overflow to infinity, subnormals kept; NaN stays NaN.
VQK_INLINE uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Adding 0.5 leaves the rounded subnormal in the low mantissa bits.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite));
}

VQK_INLINE size_t dtype_size(int32_t dtype) { return dtype == VQK_F64 ? 8 : dtype == VQK_F32 ? 4 : 2; }

// One element as double: exact for every dtype.
VQK_INLINE double load_element(const void *data, int32_t dtype, int64_t index) {
  switch (dtype) {
    case VQK_F32: return static_cast<const float *>(data)[index];
    case VQK_F64: return static_cast<const double *>(data)[index];
    case VQK_F16: return f16_to_float(static_cast<const uint16_t *>(data)[index]);
    default: return bf16_to_float(static_cast<const uint16_t *>(data)[index]);
  }
}

VQK_INLINE void store_element(void *data, int32_t dtype, int64_t index, double value) {
  switch (dtype) {
    case VQK_F32: static_cast<float *>(data)[index] = static_cast<float>(value); break;
    case VQK_F64: static_cast<double *>(data)[index] = value; break;
    case VQK_F16: static_cast<uint16_t *>(data)[index] = float_to_f16(static_cast<float>(value)); break;
    default: static_cast<uint16_t *>(data)[index] = float_to_bf16(static_cast<float>(value)); break;
  }
}

VQK_INLINE const void *offset(const void *data, int32_t dtype, int64_t elements) {
  return static_cast<const char *>(data) + elements * static_cast<int64_t>(dtype_size(dtype));
}

VQK_INLINE void *offset(void *data, int32_t dtype, int64_t elements) {
  return static_cast<char *>(data) + elements * static_cast<int64_t>(dtype_size(dtype));
}

}  // namespace vqk

#endif
