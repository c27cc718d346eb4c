// Numbers of the matrix instructions: conversion of elements, and the one model of how products are summed.
#ifndef PTX_MATRIX_H
#define PTX_MATRIX_H

#include <cmath>
#include <limits>

#include "machine.h"

namespace ptx {

enum Element : int { f16, bf16, tf32, f64, s8, u8, f32, s32 };

// An element type by its name in an instruction; -1 if it is none that is taken.
inline int element(const std::string &name) {
  const char *const names[] = {"f16", "bf16", "tf32", "f64", "s8", "u8", "f32", "s32"};
  for (int i = 0; i < 8; ++i)
    if (name == names[i]) return i;
  return -1;
}
constexpr int bits_of(int element) {
  return element == f64 ? 64 : element == tf32 || element == f32 || element == s32 ? 32 : element == s8 || element == u8 ? 8 : 16;
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float half_to_float(uint32_t half) {
  uint32_t bits = (half & 0x7fff) << 13;
  // Scaled up by 2^112 subnormal numbers are right too; infinities and NaNs get the rest of their exponent.
  bits = bits_as<uint32_t>(bits_as<float>(bits) * 0x1p112f) | (bits >= 0x7c00u << 13 ? 0x7f800000 : 0);
  return bits_as<float>(bits | (half & 0x8000) << 16);
}

// To the nearest, ties to even.
inline uint32_t half_from_double(double x) {
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7fff;
  x = std::fabs(x);
  if (x >= 65520) return sign | 0x7c00;
  if (x < 0x1p-14) return sign | static_cast<uint32_t>(std::nearbyint(x * 0x1p24));
  const int exponent = std::ilogb(x);
  const auto digits = static_cast<uint32_t>(std::nearbyint(std::ldexp(x, 10 - exponent)));  // 1024 to 2048
  return sign | ((static_cast<uint32_t>(exponent + 14) << 10) + digits);
}

// The element in the low bits of `bits`. tf32 is a float whose last 13 bits are not read.
inline double decode(int element, uint64_t bits) {
  switch (element) {
    case f16: return half_to_float(static_cast<uint32_t>(bits & 0xffff));
    case bf16: return bits_as<float>(static_cast<uint32_t>(bits << 16));
    case tf32: return bits_as<float>(static_cast<uint32_t>(bits & 0xffffe000));
    case f32: return bits_as<float>(static_cast<uint32_t>(bits));
    case f64: return bits_as<double>(bits);
    case s8: return static_cast<int8_t>(bits);
    case u8: return static_cast<uint8_t>(bits);
    default: return static_cast<int32_t>(bits);
  }
}

inline uint64_t encode(int element, double x, bool saturate = false) {
  if (element == f64) return bits_as<uint64_t>(x);
  if (element == f16) return half_from_double(x);
  if (element == f32) return std::isnan(x) ? 0x7fffffff : bits_as<uint32_t>(static_cast<float>(x));
  if (saturate) x = std::fmin(std::fmax(x, std::numeric_limits<int32_t>::min()), std::numeric_limits<int32_t>::max());
  return static_cast<uint32_t>(static_cast<int64_t>(x));
}

// Rounds a sum as a float accumulator, toward zero. A sum beyond all floats is infinite.
inline double toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  const bool beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(x) && std::fabs(x) < 0x1p128;
  return bits_as<float>(bits_as<uint32_t>(nearest) - beyond);
}

// c += a * b; a is [rows, depth], b [depth, columns], c [rows, columns].
//
// Tensor cores multiply 8- and 16-bit floats and tf32 exactly, and add the products of a step and the accumulator as numbers
// aligned to the largest of them, cut off a few bits behind a float's last; studies of them agree on that, not on how many
// bits. So, for `accumulator` f32: the sum of a step is exact (a double holds it but for some 2^-53) and then cut off to a
// float. A step has `step` of the `depth` products. Integers are exact throughout; for f16 the last rounding is the caller's.
void multiply(int rows, int columns, int depth, int step, int accumulator, const double *a, const double *b, double *c);

bool decode_warp_matrix(Instruction &);   // ldmatrix, stmatrix, movmatrix, mma.sync
bool decode_group_matrix(Instruction &);  // wgmma

}  // namespace ptx

#endif
