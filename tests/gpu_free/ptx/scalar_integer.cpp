// Integer arithmetic. Everything wraps: it is done in unsigned 64 or 128 bits, of which the low ones count.
#include "scalar.h"

namespace ptx {
namespace {

template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, int32_t, int64_t>,
                                std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>>;
template <class T>
using Full = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
template <class T>
constexpr int width = static_cast<int>(sizeof(T)) * 8;

template <class T>
T high(T a, T b) {
  return static_cast<T>((static_cast<Full<T>>(a) * static_cast<Full<T>>(b)) >> width<T>);
}
template <class T>
uint64_t magnitude(T a) {
  return a < 0 ? uint64_t{0} - static_cast<uint64_t>(a) : static_cast<uint64_t>(a);
}
int32_t saturated(int64_t x) { return static_cast<int32_t>(x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x); }

template <class T>
struct Add {
  static T f(T a, T b) { return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); }
};
template <class T>
struct Sub {
  static T f(T a, T b) { return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b)); }
};
int32_t add_sat(int32_t a, int32_t b) { return saturated(int64_t{a} + b); }
int32_t sub_sat(int32_t a, int32_t b) { return saturated(int64_t{a} - b); }
template <class T>
struct MulLo {
  static T f(T a, T b) { return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b)); }
};
template <class T>
struct MulHi {
  static T f(T a, T b) { return high(a, b); }
};
template <class T>
struct MadLo {
  static T f(T a, T b, T c) { return Add<T>::f(MulLo<T>::f(a, b), c); }
};
template <class T>
struct MadHi {
  static T f(T a, T b, T c) { return Add<T>::f(high(a, b), c); }
};
template <class T>
struct MulWide {
  static Wide<T> f(T a, T b) { return MulLo<Wide<T>>::f(a, b); }
};
template <class T>
struct MadWide {
  static Wide<T> f(T a, T b, Wide<T> c) { return MadLo<Wide<T>>::f(a, b, c); }
};
// The low 32 bits of the product of 24 bits, or the bits above the low 16.
template <class T, int shift>
T product24(T a, T b) {
  const auto cut = [](T x) { return static_cast<int64_t>(static_cast<T>(static_cast<uint32_t>(x) << 8) >> 8); };
  return static_cast<T>((cut(a) * cut(b)) >> shift);
}
// Division by zero: PTX leaves the value open, and compilers do divide by zero where nothing uses the result. All ones is
// what ptxas makes of quotient and remainder.
template <class T>
struct Div {
  static T f(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub<T>::f(0, a);
    return static_cast<T>(a / b);
  }
};
template <class T>
struct Rem {
  static T f(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
template <class T>
struct Neg {
  static T f(T a) { return Sub<T>::f(0, a); }
};
template <class T>
struct Abs {
  static T f(T a) { return static_cast<T>(magnitude(a)); }
};
template <class T>
struct Min {
  static T f(T a, T b) { return a < b ? a : b; }
};
template <class T>
struct Max {
  static T f(T a, T b) { return a > b ? a : b; }
};
template <class T>
struct Sad {
  static T f(T a, T b, T c) { return Add<T>::f(c, a < b ? Sub<T>::f(b, a) : Sub<T>::f(a, b)); }
};
template <class A, class B>
uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int k = 0; k < 32; k += 8) c += static_cast<uint32_t>(static_cast<A>(a >> k) * static_cast<B>(b >> k));
  return c;
}

template <template <class> class Op>
Decoded for_wide(Type t) {
  switch (t) {
    case Type::u16: return each_lane<Op<uint16_t>::f>();
    case Type::s16: return each_lane<Op<int16_t>::f>();
    case Type::u32: return each_lane<Op<uint32_t>::f>();
    case Type::s32: return each_lane<Op<int32_t>::f>();
    default: return {};
  }
}

Decoded decode_product(const std::string &op, Words &words) {
  const int part = words.one_of({"lo", "hi", "wide"});
  const Type t = words.type();
  if (op == "mul")
    return part == 0 ? for_integers<MulLo>(t) : part == 1 ? for_integers<MulHi>(t) : part == 2 ? for_wide<MulWide>(t) : Decoded{};
  return part == 0 ? for_integers<MadLo>(t) : part == 1 ? for_integers<MadHi>(t) : part == 2 ? for_wide<MadWide>(t) : Decoded{};
}

Decoded decode_product24(Words &words) {
  const int part = words.one_of({"lo", "hi"});
  const Type t = words.type();
  if (t == Type::u32) return part == 0 ? each_lane<product24<uint32_t, 0>>() : each_lane<product24<uint32_t, 16>>();
  if (t == Type::s32) return part == 0 ? each_lane<product24<int32_t, 0>>() : each_lane<product24<int32_t, 16>>();
  return {};
}

Decoded decode_dp4a(Words &words) {
  const Type a = words.type(), b = words.type();
  if (a == Type::u32) return b == Type::u32 ? each_lane<dp4a<uint8_t, uint8_t>>() : each_lane<dp4a<uint8_t, int8_t>>();
  return b == Type::u32 ? each_lane<dp4a<int8_t, uint8_t>>() : each_lane<dp4a<int8_t, int8_t>>();
}

}  // namespace

Decoded decode_integer(Instruction &, const std::string &op, Words &words) {
  if (op == "mul" || op == "mad") return decode_product(op, words);
  if (op == "mul24") return decode_product24(words);
  if (op == "dp4a") return decode_dp4a(words);
  const bool sat = words.take("sat");
  const Type t = words.type();
  if (sat)
    return t != Type::s32 ? Decoded{} : op == "add" ? each_lane<add_sat>() : op == "sub" ? each_lane<sub_sat>() : Decoded{};
  if (op == "add") return for_integers<Add>(t);
  if (op == "sub") return for_integers<Sub>(t);
  if (op == "div") return for_integers<Div>(t);
  if (op == "rem") return for_integers<Rem>(t);
  if (op == "neg") return for_integers<Neg>(t);
  if (op == "abs") return for_integers<Abs>(t);
  if (op == "min") return for_integers<Min>(t);
  if (op == "max") return for_integers<Max>(t);
  if (op == "sad") return for_integers<Sad>(t);
  return {};
}

}  // namespace ptx
