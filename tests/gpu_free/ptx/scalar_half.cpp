// Arithmetic of f16 and bf16, single and in pairs: in double precision, rounded once.
#include "scalar_number.h"

namespace ptx {
namespace {

// Sums are rounded to odd in double precision, since those of bf16 may have more bits; products are exact.
template <class T>
struct Add {
  static T f(T a, T b) { return T(add_to_odd(a, b)); }
};
template <class T>
struct Sub {
  static T f(T a, T b) { return T(add_to_odd(a, -double(b))); }
};
template <class T>
struct Mul {
  static T f(T a, T b) { return T(double(a) * double(b)); }
};
template <class T>
struct Fma {
  static T f(T a, T b, T c) { return T(add_to_odd(double(a) * double(b), c)); }
};
template <class T>
struct FmaRelu {
  static T f(T a, T b, T c) {
    const T d = Fma<T>::f(a, b, c);
    return double(d) < 0 || d.bits == 0x8000 ? T::of(0) : d;
  }
};
template <class T>
struct Neg {
  static T f(T a) { return T::of(a.bits ^ 0x8000u); }
};
template <class T>
struct Abs {
  static T f(T a) { return T::of(a.bits & 0x7fffu); }
};
template <class T, bool lower, bool nan>
T extreme(T a, T b) {
  const double x = a, y = b;
  if (x != x || y != y) return (nan || (x != x && y != y)) ? T::of(0x7fff) : x != x ? b : a;
  if (x == y) return (a.bits >> 15) == lower ? a : b;  // -0 is less than +0
  return (x < y) == lower ? a : b;
}
template <class T>
struct Min {
  static T f(T a, T b) { return extreme<T, true, false>(a, b); }
};
template <class T>
struct Max {
  static T f(T a, T b) { return extreme<T, false, false>(a, b); }
};
template <class T>
struct MinNan {
  static T f(T a, T b) { return extreme<T, true, true>(a, b); }
};
template <class T>
struct MaxNan {
  static T f(T a, T b) { return extreme<T, false, true>(a, b); }
};
// That of bf16 flushes subnormals, which for its operand makes no difference.
template <class T>
struct Exp2 {
  static T f(T a) {
    const double result = std::exp2(double(a));
    return T(std::is_same_v<T, Brain> && result < 0x1p-126 ? 0.0 : result);
  }
};
template <class T>
struct Tanh {
  static T f(T a) { return T(std::tanh(double(a))); }
};

// f for both halves of 32 bits.
template <auto f>
struct Twice;
template <class T, class... A, T (*f)(A...)>
struct Twice<f> {
  template <class>
  using Pair = uint32_t;
  static uint32_t run(Pair<A>... a) {
    return f(A::of(a & 0xffff)...).bits | static_cast<uint32_t>(f(A::of(a >> 16)...).bits) << 16;
  }
};

template <template <class> class Op>
Decoded for_halves(Type t) {
  switch (t) {
    case Type::f16: return each_lane<Op<Half>::f>();
    case Type::bf16: return each_lane<Op<Brain>::f>();
    case Type::f16x2: return each_lane<Twice<Op<Half>::f>::run>();
    case Type::bf16x2: return each_lane<Twice<Op<Brain>::f>::run>();
    default: return {};
  }
}

}  // namespace

Decoded decode_half(Instruction &, const std::string &op, Words &words) {
  const bool rn = words.take("rn"), approx = words.take("approx"), nan = words.take("NaN");
  if (approx) {
    const bool ftz = words.take("ftz");
    const Type t = words.type();
    if (op == "tanh") return ftz ? Decoded{} : for_halves<Tanh>(t);
    const bool brain = t == Type::bf16 || t == Type::bf16x2;
    return op != "ex2" || ftz != brain ? Decoded{} : for_halves<Exp2>(t);
  }
  const bool relu = words.take("relu");
  const Type t = words.type();
  if (op == "fma") return !rn ? Decoded{} : relu ? for_halves<FmaRelu>(t) : for_halves<Fma>(t);
  if (relu) return {};
  if (op == "min") return nan ? for_halves<MinNan>(t) : for_halves<Min>(t);
  if (op == "max") return nan ? for_halves<MaxNan>(t) : for_halves<Max>(t);
  if (nan) return {};
  if (op == "add") return for_halves<Add>(t);
  if (op == "sub") return for_halves<Sub>(t);
  if (op == "mul") return for_halves<Mul>(t);
  if (op == "neg") return for_halves<Neg>(t);
  if (op == "abs") return for_halves<Abs>(t);
  return {};
}

}  // namespace ptx
