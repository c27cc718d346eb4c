// Comparisons and selections.
#include "scalar_number.h"

namespace ptx {
namespace {

enum Comparison { eq, ne, lt, le, gt, ge, lo, ls, hi, hs, equ, neu, ltu, leu, gtu, geu, num, nan_, comparisons };

template <Comparison c, class T>
bool compare(T a, T b) {
  if constexpr (c == eq) return a == b;
  if constexpr (c == ne) return a < b || a > b;  // false if there is a NaN
  if constexpr (c == lt || c == lo) return a < b;
  if constexpr (c == le || c == ls) return a <= b;
  if constexpr (c == gt || c == hi) return a > b;
  if constexpr (c == ge || c == hs) return a >= b;
  if constexpr (c == equ) return !(a < b || a > b);
  if constexpr (c == neu) return a != b;
  if constexpr (c == ltu) return !(a >= b);
  if constexpr (c == leu) return !(a > b);
  if constexpr (c == gtu) return !(a <= b);
  if constexpr (c == geu) return !(a < b);
  if constexpr (c == num) return a == a && b == b;
  return a != a || b != b;
}

// detail: [0] 0, or 1 + and, or, xor; [1] for `set`: the type of the result, and [2] its operand of the boolean operator.
bool combined(int with, bool t, bool c) { return with == 1 ? t && c : with == 2 ? t || c : with == 3 ? t != c : t; }

// V: what a T is compared as.
template <Comparison c, class T, class V>
Outcome setp(Warp &w, const Instruction &i, Lanes lanes) {
  uint64_t room[5][32];
  const Operand &to = i.operands[0];
  const bool two = to.kind == Operand::vector;
  const uint64_t *a = values(w, i.operands[1], room[0]), *b = values(w, i.operands[2], room[1]);
  const int with = i.detail[0];
  if (!two && !with) {
    uint64_t *p = target(w, to, room[3]);
    each(lanes, [&](int lane) { p[lane] = compare<c>(V(from_bits<T>(a[lane])), V(from_bits<T>(b[lane]))); });
    return Outcome::next;
  }
  const uint64_t *other = with ? values(w, i.operands[3], room[2]) : room[2];
  uint64_t *p = target(w, two ? to.items[0] : to, room[3]), *q = two ? target(w, to.items[1], room[4]) : room[4];
  each(lanes, [&](int lane) {
    const bool t = compare<c>(V(from_bits<T>(a[lane])), V(from_bits<T>(b[lane]))), and_then = with && (other[lane] & 1);
    p[lane] = combined(with, t, and_then);
    q[lane] = combined(with, !t, and_then);
  });
  return Outcome::next;
}
template <Comparison c, class T, class V>
Outcome set(Warp &w, const Instruction &i, Lanes lanes) {
  uint64_t room[4][32];
  const uint64_t *a = values(w, i.operands[1], room[0]), *b = values(w, i.operands[2], room[1]);
  const int with = i.detail[0];
  const uint64_t *other = with ? values(w, i.operands[3], room[2]) : room[2];
  uint64_t *d = target(w, i.operands[0], room[3]);
  const uint64_t yes = i.detail[1] ? to_bits(1.0f) : 0xffffffff;
  each(lanes, [&](int lane) {
    const bool t = compare<c>(V(from_bits<T>(a[lane])), V(from_bits<T>(b[lane])));
    d[lane] = combined(with, t, with && (other[lane] & 1)) ? yes : 0;
  });
  return Outcome::next;
}

template <Comparison c, class T, class V>
Execute either(bool predicate) {
  return predicate ? setp<c, T, V> : set<c, T, V>;
}
template <Comparison c>
Execute for_type(Type t, bool ftz, bool predicate) {
  constexpr bool integer = c <= hs, real = c != lo && c != ls && c != hi && c != hs;
  if constexpr (integer) {
    switch (t) {
      case Type::s16: return c >= lo ? nullptr : either<c, int16_t, int16_t>(predicate);
      case Type::s32: return c >= lo ? nullptr : either<c, int32_t, int32_t>(predicate);
      case Type::s64: return c >= lo ? nullptr : either<c, int64_t, int64_t>(predicate);
      case Type::b16:
      case Type::u16: return either<c, uint16_t, uint16_t>(predicate);
      case Type::b32:
      case Type::u32: return either<c, uint32_t, uint32_t>(predicate);
      case Type::b64:
      case Type::u64: return either<c, uint64_t, uint64_t>(predicate);
      default: break;
    }
  }
  if constexpr (real) {
    switch (t) {
      case Type::f16: return either<c, Half, double>(predicate);
      case Type::bf16: return either<c, Brain, double>(predicate);
      case Type::f32: return ftz ? either<c, Flushed, float>(predicate) : either<c, float, float>(predicate);
      case Type::f64: return either<c, double, double>(predicate);
      default: break;
    }
  }
  return nullptr;
}
template <int... c>
Execute for_comparison(int which, Type t, bool ftz, bool predicate, std::integer_sequence<int, c...>) {
  Execute found = nullptr;
  (void)((c == which && ((found = for_type<static_cast<Comparison>(c)>(t, ftz, predicate)), true)) || ...);
  return found;
}

Decoded decode_comparison(Instruction &i, bool predicate, Words &words) {
  const int which = words.one_of(
      {"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"});
  const int with = words.one_of({"and", "or", "xor"}) + 1;
  const bool ftz = words.take("ftz");
  const Type result = predicate ? Type::pred : words.type(), t = words.type();
  i.detail[0] = with;
  i.detail[1] = result == Type::f32;
  if (!predicate && result != Type::u32 && result != Type::s32 && result != Type::f32) return {};
  set_float_numbers(i, t);
  return {for_comparison(which, t, ftz, predicate, std::make_integer_sequence<int, comparisons>()), with ? size_t{4} : size_t{3}};
}

template <class T>
T selp(T a, T b, Pred c) {
  return c ? a : b;
}
template <class T>
T slct_integer(T a, T b, int32_t c) {
  return c >= 0 ? a : b;
}
// A NaN selects b, -0 selects a.
template <class T, class F>
T slct_float(T a, T b, F c) {
  return float(c) >= 0 ? a : b;
}

template <class T>
Decoded for_selection(bool predicate, Type condition, bool ftz) {
  if (predicate) return each_lane<selp<T>>();
  if (condition == Type::s32) return each_lane<slct_integer<T>>();
  return ftz ? each_lane<slct_float<T, Flushed>>() : each_lane<slct_float<T, float>>();
}

Decoded decode_selection(Instruction &i, bool predicate, Words &words) {
  const bool ftz = words.take("ftz");
  const Type t = words.type(), condition = predicate ? Type::pred : words.type();
  if (!predicate && condition != Type::s32 && condition != Type::f32) return {};
  set_float_numbers(i, t);
  switch (bits_of(t)) {
    case 16: return for_selection<uint16_t>(predicate, condition, ftz);
    case 32: return for_selection<uint32_t>(predicate, condition, ftz);
    case 64: return for_selection<uint64_t>(predicate, condition, ftz);
    default: return {};
  }
}

// testp: which kind of float it is.
template <class F>
Pred is_finite(F a) {
  return {std::isfinite(a)};
}
template <class F>
Pred is_infinite(F a) {
  return {std::isinf(a)};
}
template <class F>
Pred is_number(F a) {
  return {!std::isnan(a)};
}
template <class F>
Pred is_nan(F a) {
  return {std::isnan(a)};
}
template <class F>
Pred is_normal(F a) {
  return {std::isnormal(a) || a == 0};  // zeros count as normal
}
template <class F>
Pred is_subnormal(F a) {
  return {std::fpclassify(a) == FP_SUBNORMAL};
}
template <class F>
Decoded for_kind(int kind) {
  switch (kind) {
    case 0: return each_lane<is_finite<F>>();
    case 1: return each_lane<is_infinite<F>>();
    case 2: return each_lane<is_number<F>>();
    case 3: return each_lane<is_nan<F>>();
    case 4: return each_lane<is_normal<F>>();
    case 5: return each_lane<is_subnormal<F>>();
    default: return {};
  }
}

}  // namespace

Decoded decode_compare(Instruction &i, const std::string &op, Words &words) {
  if (op == "setp" || op == "set") return decode_comparison(i, op == "setp", words);
  if (op == "selp" || op == "slct") return decode_selection(i, op == "selp", words);
  if (op != "testp") return {};
  const int kind = words.one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  const Type t = words.type();
  return t == Type::f32 ? for_kind<float>(kind) : t == Type::f64 ? for_kind<double>(kind) : Decoded{};
}

}  // namespace ptx
