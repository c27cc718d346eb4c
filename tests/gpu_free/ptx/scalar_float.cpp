// Arithmetic of f32 and f64. What PTX defines as IEEE is: one rounding, by the host's own. The .approx functions, whose
// last bits PTX leaves to the GPU, are the nearest float to the double precision result.
#include <cfenv>

#include "scalar_number.h"

namespace ptx {
namespace {

// The rounding of the host while an instruction executes.
struct Rounding {
  explicit Rounding(int mode) { std::fesetround(mode); }
  ~Rounding() { std::fesetround(FE_TONEAREST); }
};
template <auto f, int mode>
Outcome rounded(Warp &w, const Instruction &i, Lanes lanes) {
  const Rounding rounding(mode);
  return Each<f>::execute(w, i, lanes);
}

// T: float, Flushed or double, what operands are; R: T or Saturated<T>, what results are; V: the values' type.
template <class T>
using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, class R>
struct Add {
  static R f(T a, T b) { return R(canonical(Value<T>(a) + Value<T>(b))); }
};
template <class T, class R>
struct Sub {
  static R f(T a, T b) { return R(canonical(Value<T>(a) - Value<T>(b))); }
};
template <class T, class R>
struct Mul {
  static R f(T a, T b) { return R(canonical(Value<T>(a) * Value<T>(b))); }
};
template <class T, class R>
struct Fma {
  static R f(T a, T b, T c) { return R(canonical(std::fma(Value<T>(a), Value<T>(b), Value<T>(c)))); }
};
template <class T, class R>
struct Div {
  static R f(T a, T b) { return R(canonical(Value<T>(a) / Value<T>(b))); }
};
template <class T, class R>
struct Sqrt {
  static R f(T a) { return R(canonical(std::sqrt(Value<T>(a)))); }
};
template <class T, class R>
struct Rcp {
  static R f(T a) { return R(canonical(1 / Value<T>(a))); }
};
template <class T, class R>
struct Neg {
  static R f(T a) { return R(-Value<T>(a)); }
};
template <class T, class R>
struct Abs {
  static R f(T a) { return R(std::fabs(Value<T>(a))); }
};
// A NaN loses against a number, and -0 is less than +0.
template <class V>
V lesser(V a, V b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class V>
V greater(V a, V b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T, class R>
struct Min {
  static R f(T a, T b) { return R(lesser(Value<T>(a), Value<T>(b))); }
};
template <class T, class R>
struct Max {
  static R f(T a, T b) { return R(greater(Value<T>(a), Value<T>(b))); }
};
// .NaN: a NaN wins. .xorsign.abs: of the magnitudes, with the product's sign.
template <class T, class R, bool lower, bool nan, bool xorsign>
R extreme(T x, T y) {
  Value<T> a = x, b = y;
  const bool negative = std::signbit(a) != std::signbit(b);
  if (nan && (a != a || b != b)) return R(canonical(a + b));
  if (xorsign) a = std::fabs(a), b = std::fabs(b);
  const Value<T> result = lower ? lesser(a, b) : greater(a, b);
  return R(xorsign && result == result ? std::copysign(result, negative ? Value<T>(-1) : Value<T>(1)) : result);
}
template <class T>
T with_sign(T a, T b) {
  return std::copysign(b, a);
}

// Functions of the .approx kind, in double precision.
double reciprocal(double x) { return 1 / x; }
double reciprocal_root(double x) { return 1 / std::sqrt(x); }
template <class T, double (*f)(double)>
T approximate(T a) {
  return T(canonical(static_cast<float>(f(static_cast<double>(static_cast<float>(a))))));
}
double rcp64(double x) { return 1 / x; }
double rsqrt64(double x) { return 1 / std::sqrt(x); }

// f for its type; `mode` is an FE_ constant.
template <auto f>
Decoded with_rounding(int mode) {
  switch (mode) {
    case FE_TOWARDZERO: return {rounded<f, FE_TOWARDZERO>, operands_of(f)};
    case FE_DOWNWARD: return {rounded<f, FE_DOWNWARD>, operands_of(f)};
    case FE_UPWARD: return {rounded<f, FE_UPWARD>, operands_of(f)};
    default: return each_lane<f>();
  }
}

template <template <class, class> class Op>
Decoded for_floats(Type t, bool ftz, bool sat, int mode) {
  if (t == Type::f64) return ftz || sat ? Decoded{} : with_rounding<Op<double, double>::f>(mode);
  if (t != Type::f32) return {};
  if (ftz) return sat ? with_rounding<Op<Flushed, Saturated<Flushed>>::f>(mode) : with_rounding<Op<Flushed, Flushed>::f>(mode);
  return sat ? with_rounding<Op<float, Saturated<float>>::f>(mode) : with_rounding<Op<float, float>::f>(mode);
}

template <double (*f)(double)>
Decoded for_approximate(Type t, bool ftz) {
  if (t != Type::f32) return {};
  return ftz ? each_lane<approximate<Flushed, f>>() : each_lane<approximate<float, f>>();
}

template <bool lower, bool nan, bool xorsign>
Decoded for_extreme(bool ftz) {
  return ftz ? each_lane<extreme<Flushed, Flushed, lower, nan, xorsign>>()
             : each_lane<extreme<float, float, lower, nan, xorsign>>();
}

template <bool lower>
Decoded decode_extreme(Words &words, Type t, bool ftz) {
  const bool nan = words.take("NaN"), xorsign = words.take("xorsign");
  if (xorsign && !words.take("abs")) return {};
  if (!nan && !xorsign) {
    if constexpr (lower) return for_floats<Min>(t, ftz, false, FE_TONEAREST);
    return for_floats<Max>(t, ftz, false, FE_TONEAREST);
  }
  if (t != Type::f32) return {};
  return !nan      ? for_extreme<lower, false, true>(ftz)
         : xorsign ? for_extreme<lower, true, true>(ftz)
                   : for_extreme<lower, true, false>(ftz);
}

Decoded decode_approximate(const std::string &op, Type t, bool ftz) {
  if (op == "rcp") return t == Type::f64 ? each_lane<rcp64>() : for_approximate<reciprocal>(t, ftz);
  if (op == "rsqrt") return t == Type::f64 ? each_lane<rsqrt64>() : for_approximate<reciprocal_root>(t, ftz);
  if (op == "sqrt") return for_approximate<std::sqrt>(t, ftz);
  if (op == "ex2") return for_approximate<std::exp2>(t, ftz);
  if (op == "lg2") return for_approximate<std::log2>(t, ftz);
  if (op == "sin") return for_approximate<std::sin>(t, ftz);
  if (op == "cos") return for_approximate<std::cos>(t, ftz);
  if (op == "tanh") return for_approximate<std::tanh>(t, ftz);
  if (op == "div") return t == Type::f32 ? for_floats<Div>(t, ftz, false, FE_TONEAREST) : Decoded{};
  return {};
}

Decoded choose(const std::string &op, Words &words, Type &t) {
  const int direction = words.one_of({"rn", "rz", "rm", "rp"});
  const int mode = direction == 1 ? FE_TOWARDZERO : direction == 2 ? FE_DOWNWARD : direction == 3 ? FE_UPWARD : FE_TONEAREST;
  const bool approx = words.take("approx") || words.take("full"), ftz = words.take("ftz"), sat = words.take("sat");
  t = words.type();
  if (approx) return sat || direction >= 0 ? Decoded{} : decode_approximate(op, t, ftz);
  if (op == "add") return for_floats<Add>(t, ftz, sat, mode);
  if (op == "sub") return for_floats<Sub>(t, ftz, sat, mode);
  if (op == "mul") return for_floats<Mul>(t, ftz, sat, mode);
  const bool exact = direction >= 0;  // these must say how they round
  if (op == "fma" || op == "mad") return exact ? for_floats<Fma>(t, ftz, sat, mode) : Decoded{};
  if (sat) return {};
  if (op == "div") return exact ? for_floats<Div>(t, ftz, sat, mode) : Decoded{};
  if (op == "sqrt") return exact ? for_floats<Sqrt>(t, ftz, sat, mode) : Decoded{};
  if (op == "rcp") return exact ? for_floats<Rcp>(t, ftz, sat, mode) : Decoded{};
  if (exact) return {};
  if (op == "neg") return for_floats<Neg>(t, ftz, sat, mode);
  if (op == "abs") return for_floats<Abs>(t, ftz, sat, mode);
  if (op == "min") return decode_extreme<true>(words, t, ftz);
  if (op == "max") return decode_extreme<false>(words, t, ftz);
  if (op != "copysign") return {};
  return t == Type::f64 ? each_lane<with_sign<double>>() : t == Type::f32 ? each_lane<with_sign<float>>() : Decoded{};
}

}  // namespace

Decoded decode_float(Instruction &i, const std::string &op, Words &words) {
  Type type = Type::none;
  const Decoded decoded = choose(op, words, type);
  if (decoded.execute && (type == Type::f32 || type == Type::f64)) set_float_numbers(i, type);
  return decoded;
}

}  // namespace ptx
