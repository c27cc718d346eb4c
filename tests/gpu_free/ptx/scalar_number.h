// Floating-point numbers as PTX rounds them, for scalar_float.cpp, scalar_half.cpp and scalar_convert.cpp.
#ifndef PTX_SCALAR_NUMBER_H
#define PTX_SCALAR_NUMBER_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include "scalar.h"

namespace ptx {

// How to round: to a number of fewer bits (nearest: to even; away: ties away from zero), or to an integer.
enum class Round : int { nearest, zero, down, up, away, integer_nearest, integer_zero, integer_down, integer_up };

// ±m * 2^e, rounded once to a format of `E` bits of exponent and `M` of mantissa: its bits.
template <int E, int M>
uint64_t encode(bool negative, uint64_t m, int e, Round round) {
  constexpr int bias = (1 << (E - 1)) - 1;
  constexpr uint64_t infinite = ((uint64_t{1} << E) - 1) << M;
  const uint64_t sign = uint64_t{negative} << (E + M);
  if (m == 0) return sign;
  const int exponent = e + 63 - __builtin_clzll(m);
  const bool normal = exponent >= 1 - bias;
  const int shift = (normal ? exponent : 1 - bias) - M - e;  // bits of m below the last one kept
  uint64_t kept, lost, half;
  if (shift <= 0) {
    kept = m << -shift, lost = 0, half = 1;
  } else if (shift < 64) {
    kept = m >> shift, lost = m & ((uint64_t{1} << shift) - 1), half = uint64_t{1} << (shift - 1);
  } else {
    kept = 0, lost = shift > 64 ? 1 : m, half = shift > 64 ? 2 : uint64_t{1} << 63;
  }
  const bool raise = round == Round::nearest ? lost > half || (lost == half && (kept & 1))
                     : round == Round::away  ? lost >= half && lost != 0
                     : round == Round::down  ? negative && lost != 0
                     : round == Round::up    ? !negative && lost != 0
                                             : false;
  // A carry out of the mantissa goes on into the exponent.
  uint64_t bits = kept + raise;
  if (normal) bits += (static_cast<uint64_t>(exponent + bias) << M) - (uint64_t{1} << M);
  if (exponent > bias || bits >= infinite) {
    const bool inward = round == Round::zero || (round == Round::down && !negative) || (round == Round::up && negative);
    bits = inward ? infinite - 1 : infinite;
  }
  return sign | bits;
}

// The same of a double; NaN is the canonical one, all ones but for the sign.
template <int E, int M>
uint64_t encode(double x, Round round) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool negative = bits >> 63;
  const int exponent = static_cast<int>(bits >> 52 & 2047);
  const uint64_t mantissa = bits & ((uint64_t{1} << 52) - 1);
  if (exponent == 2047) {
    const uint64_t all = (uint64_t{1} << (E + M)) - 1, infinite = ((uint64_t{1} << E) - 1) << M;
    return mantissa ? all : (uint64_t{negative} << (E + M)) | infinite;
  }
  return encode<E, M>(negative, exponent ? mantissa | uint64_t{1} << 52 : mantissa, (exponent ? exponent : 1) - 1075, round);
}

// A float of 16 bits. Its arithmetic is that of doubles, rounded.
template <int E, int M>
struct Small {
  uint16_t bits;

  Small() = default;
  explicit Small(double x) : Small(x, Round::nearest) {}
  Small(double x, Round round) : bits(static_cast<uint16_t>(encode<E, M>(x, round))) {}
  static Small of(unsigned bits) {
    Small result;
    result.bits = static_cast<uint16_t>(bits);
    return result;
  }
  operator double() const {
    constexpr int bias = (1 << (E - 1)) - 1;
    const uint64_t sign = uint64_t{bits} >> (E + M) << 63;
    const int exponent = bits >> M & ((1 << E) - 1);
    const uint64_t mantissa = bits & ((1u << M) - 1);
    uint64_t wide;
    double result;
    if (exponent == (1 << E) - 1 && mantissa) {
      wide = uint64_t{0x7fffffffe0000000};  // the canonical NaN of single precision
    } else if (exponent == (1 << E) - 1) {
      wide = sign | uint64_t{2047} << 52;
    } else if (exponent) {
      wide = sign | static_cast<uint64_t>(exponent - bias + 1023) << 52 | mantissa << (52 - M);
    } else {
      result = std::ldexp(static_cast<double>(mantissa), 1 - bias - M);
      return sign ? -result : result;
    }
    std::memcpy(&result, &wide, sizeof result);
    return result;
  }
};
using Half = Small<5, 10>;
using Brain = Small<8, 7>;

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }  // NaN: not less

// A float of an .ftz instruction: subnormals become zeros, on the way in and on the way out.
struct Flushed {
  float value;
  Flushed() = default;
  explicit Flushed(float x) : value(flushed(x)) {}
  operator float() const { return flushed(value); }
};
// A result with .sat.
template <class T>
struct Saturated {
  T value;
  template <class X>
  explicit Saturated(X x) : value(x > 0 ? (x < 1 ? T(x) : T(1)) : T(0)) {}  // NaN: 0
};

// The canonical NaN of single precision instead of whichever the host made.
inline float canonical(float x) {
  if (x == x) return x;
  const uint32_t bits = 0x7fffffff;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline double canonical(double x) { return x; }  // double precision keeps payloads

// a + b rounded to odd: rounding it again, to two bits less or fewer, is rounding the exact sum once.
inline double add_to_odd(double a, double b) {
  double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double other = sum - a, error = (a - (sum - other)) + (b - other);
  if (error == 0) return sum;
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  if ((error > 0) != (sum > 0)) bits--;  // the exact sum is nearer to zero: truncate
  bits |= 1;
  std::memcpy(&sum, &bits, sizeof sum);
  return sum;
}

}  // namespace ptx

#endif
