// cvt: every type into every other, rounded once and clamped as PTX says.
#include <limits>

#include "scalar_number.h"

namespace ptx {
namespace {

// detail of a cvt: [0] Round, [1] .sat, [2] .ftz, [3] .relu.
struct How {
  Round round;
  bool sat, ftz, relu;
};
How how(const Instruction &i) { return {static_cast<Round>(i.detail[0]), i.detail[1] != 0, i.detail[2] != 0, i.detail[3] != 0}; }

template <class T>
constexpr bool is_int = std::is_integral_v<T>;

double to_integer(double x, Round round) {
  switch (round) {
    case Round::integer_nearest: return std::nearbyint(x);
    case Round::integer_zero: return std::trunc(x);
    case Round::integer_down: return std::floor(x);
    case Round::integer_up: return std::ceil(x);
    default: return x;
  }
}

// ±m * 2^e as a float of type D.
template <class D>
D encoded(bool negative, uint64_t m, int e, Round round) {
  if constexpr (std::is_same_v<D, Half>) return Half::of(static_cast<unsigned>(encode<5, 10>(negative, m, e, round)));
  if constexpr (std::is_same_v<D, Brain>) return Brain::of(static_cast<unsigned>(encode<8, 7>(negative, m, e, round)));
  if constexpr (std::is_same_v<D, float>) return from_bits<float>(encode<8, 23>(negative, m, e, round));
  if constexpr (std::is_same_v<D, double>) return from_bits<double>(encode<11, 52>(negative, m, e, round));
}
template <class D>
D narrowed(double x, Round round) {
  if constexpr (std::is_same_v<D, double>) {
    return x;
  } else if constexpr (std::is_same_v<D, float>) {
    // A NaN keeps the upper part of its payload.
    return round == Round::nearest || x != x ? static_cast<float>(x) : from_bits<float>(encode<8, 23>(x, round));
  } else {
    return D(x, round);
  }
}

template <class D, class S>
D integer_to_integer(S x, bool sat) {
  if (sat) {
    const __int128 low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max(), value = x;
    return static_cast<D>(value < low ? low : value > high ? high : value);
  }
  return static_cast<D>(x);
}

template <class D>
D float_to_integer(double x, Round round, bool nan_is_zero) {
  if (x != x) return nan_is_zero ? D{0} : static_cast<D>(uint64_t{1} << (sizeof(D) * 8 - 1));
  x = to_integer(x, round);
  constexpr D low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
  if (x <= static_cast<double>(low)) return low;
  if (x >= static_cast<double>(high)) return high;  // 2^63 and 2^64 are one above `high`, which no double is
  return static_cast<D>(x);
}

template <class D>
D limited(double x, const How &h) {
  if (h.sat) x = x > 0 ? (x < 1 ? x : 1) : 0;  // NaN: 0
  if (h.relu && x < 0) x = 0;
  return narrowed<D>(x == 0 && (h.sat || h.relu) ? 0.0 : x, h.round);
}

template <class D, class S>
D convert(S source, const How &h) {
  if constexpr (is_int<S> && is_int<D>) {
    return integer_to_integer<D>(source, h.sat);
  } else if constexpr (is_int<S>) {
    const bool negative = source < 0;
    const uint64_t magnitude = negative ? uint64_t{0} - static_cast<uint64_t>(source) : static_cast<uint64_t>(source);
    if (h.sat) return limited<D>(negative ? 0 : static_cast<double>(magnitude), h);
    return encoded<D>(negative, magnitude, 0, h.round);
  } else {
    if constexpr (std::is_same_v<S, float>) {
      if (h.ftz) source = flushed(source);
    }
    const double x = source;
    if constexpr (is_int<D>) {
      return float_to_integer<D>(x, h.round, !std::is_same_v<S, double> && sizeof(D) < 8);
    } else if constexpr (std::is_same_v<S, float> && std::is_same_v<D, double>) {
      return h.sat ? limited<D>(x, h) : x;
    } else {
      D d = limited<D>(to_integer(x, h.round), h.round >= Round::integer_nearest ? How{Round::nearest, h.sat, h.ftz, h.relu} : h);
      if constexpr (std::is_same_v<D, float>) {
        if (h.ftz) d = flushed(d);
      }
      return d;
    }
  }
}

template <class D, class S>
Outcome cvt(Warp &w, const Instruction &i, Lanes lanes) {
  uint64_t room[2][32];
  const Operand &to = i.operands[0];
  const uint64_t *a = values(w, i.operands[1], room[0]);
  uint64_t *d = target(w, to, room[1]);
  const How h = how(i);
  const int width = to.width;
  each(lanes, [&](int lane) {
    uint64_t bits = to_bits<D>(convert<D>(from_bits<S>(a[lane]), h));
    if constexpr (std::is_signed_v<D> && is_int<D>) {
      if (width > static_cast<int>(sizeof(D)) * 8) bits = extended(bits, static_cast<int>(sizeof(D)) * 8, width);
    }
    d[lane] = bits;
  });
  return Outcome::next;
}

// Two floats into one register: the first is the upper half.
template <class D>
Outcome cvt_pair(Warp &w, const Instruction &i, Lanes lanes) {
  uint64_t room[3][32];
  const uint64_t *a = values(w, i.operands[1], room[0]), *b = values(w, i.operands[2], room[1]);
  uint64_t *d = target(w, i.operands[0], room[2]);
  const How h = how(i);
  each(lanes, [&](int lane) {
    const uint64_t upper = convert<D>(from_bits<float>(a[lane]), h).bits;
    d[lane] = upper << 16 | convert<D>(from_bits<float>(b[lane]), h).bits;
  });
  return Outcome::next;
}

Outcome cvt_tf32(Warp &w, const Instruction &i, Lanes lanes) {
  uint64_t room[2][32];
  const uint64_t *a = values(w, i.operands[1], room[0]);
  uint64_t *d = target(w, i.operands[0], room[1]);
  const How h = how(i);
  each(lanes, [&](int lane) {
    const double x = from_bits<float>(a[lane]);
    d[lane] = x != x ? 0x7fffffff : encode<8, 10>(h.relu && x < 0 ? 0.0 : x, h.round) << 13;
  });
  return Outcome::next;
}

template <class D>
Execute from(Type source) {
  switch (source) {
    case Type::u8: return cvt<D, uint8_t>;
    case Type::u16: return cvt<D, uint16_t>;
    case Type::u32: return cvt<D, uint32_t>;
    case Type::u64: return cvt<D, uint64_t>;
    case Type::s8: return cvt<D, int8_t>;
    case Type::s16: return cvt<D, int16_t>;
    case Type::s32: return cvt<D, int32_t>;
    case Type::s64: return cvt<D, int64_t>;
    case Type::f16: return cvt<D, Half>;
    case Type::bf16: return cvt<D, Brain>;
    case Type::f32: return cvt<D, float>;
    case Type::f64: return cvt<D, double>;
    default: return nullptr;
  }
}

Execute conversion(Type to, Type source) {
  switch (to) {
    case Type::u8: return from<uint8_t>(source);
    case Type::u16: return from<uint16_t>(source);
    case Type::u32: return from<uint32_t>(source);
    case Type::u64: return from<uint64_t>(source);
    case Type::s8: return from<int8_t>(source);
    case Type::s16: return from<int16_t>(source);
    case Type::s32: return from<int32_t>(source);
    case Type::s64: return from<int64_t>(source);
    case Type::f16: return from<Half>(source);
    case Type::bf16: return from<Brain>(source);
    case Type::f32: return from<float>(source);
    case Type::f64: return from<double>(source);
    default: return nullptr;
  }
}

// Whether a cvt must say how it rounds: where the destination does not hold every value of the source.
bool must_round(Type to, Type source) {
  if (!is_float(to)) return is_float(source);
  if (!is_float(source)) return true;
  if (to == Type::f64 || to == source) return false;
  return to != Type::f32 || source == Type::f64;
}

}  // namespace

Decoded decode_convert(Instruction &i, const std::string &op, Words &words) {
  if (op != "cvt") return {};
  const int round = words.one_of({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"});
  i.detail[0] = round < 0 ? 0 : round;
  i.detail[1] = words.take("sat");
  i.detail[2] = words.take("ftz");
  i.detail[3] = words.take("relu");
  const Type to = words.type(), source = words.type();
  if (to == Type::none || source == Type::none || (i.detail[3] && source != Type::f32)) return {};
  if (must_round(to, source) && round < 0) return {};
  set_float_numbers(i, source);
  if (source == Type::f32 && to == Type::f16x2) return {cvt_pair<Half>, 3};
  if (source == Type::f32 && to == Type::bf16x2) return {cvt_pair<Brain>, 3};
  if (source == Type::f32 && to == Type::tf32) return {cvt_tf32, 2};
  return {conversion(to, source), 2};
}

}  // namespace ptx
