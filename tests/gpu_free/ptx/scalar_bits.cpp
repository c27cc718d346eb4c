// Bits: logic, shifts, fields, permutations of bytes.
#include "scalar.h"

namespace ptx {
namespace {

template <class T>
constexpr uint32_t width = static_cast<uint32_t>(sizeof(T)) * 8;

template <class T>
struct And {
  static T f(T a, T b) { return static_cast<T>(a & b); }
};
template <class T>
struct Or {
  static T f(T a, T b) { return static_cast<T>(a | b); }
};
template <class T>
struct Xor {
  static T f(T a, T b) { return static_cast<T>(a ^ b); }
};
template <class T>
struct Not {
  static T f(T a) { return static_cast<T>(~a); }
};
template <class T>
struct Cnot {
  static T f(T a) { return a == 0; }
};
Pred and_pred(Pred a, Pred b) { return {a && b}; }
Pred or_pred(Pred a, Pred b) { return {a || b}; }
Pred xor_pred(Pred a, Pred b) { return {a.value != b.value}; }
Pred not_pred(Pred a) { return {!a}; }

// Amounts beyond the width shift everything out.
template <class T>
struct Shl {
  static T f(T a, uint32_t n) { return n >= width<T> ? T{0} : static_cast<T>(static_cast<uint64_t>(a) << n); }
};
template <class T>
struct Shr {
  static T f(T a, uint32_t n) {
    if (n >= width<T>) return static_cast<T>(a < 0 ? -1 : 0);
    return static_cast<T>(a >> n);
  }
};
template <bool left, bool wrap>
uint32_t funnel(uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t n = wrap ? c & 31 : c < 32 ? c : 32;
  const uint64_t both = (uint64_t{b} << 32) | a;
  return static_cast<uint32_t>(left ? (both << n) >> 32 : both >> n);
}

template <class T>
struct Bfe {
  static T f(T a, uint32_t b, uint32_t c) {
    const uint32_t pos = b & 255, len = c & 255, last = width<T> - 1;
    if (len == 0) return 0;
    const T sign = static_cast<T>(
        std::is_signed_v<T> && (static_cast<uint64_t>(a) >> (pos + len - 1 < last ? pos + len - 1 : last)) & 1 ? -1 : 0);
    if (pos > last) return sign;
    const uint64_t kept = (static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(a))) >> pos;
    const uint32_t bits = len < width<T> - pos ? len : width<T> - pos;
    if (bits >= width<T>) return a;
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    return static_cast<T>((kept & mask) | (static_cast<uint64_t>(sign) & ~mask));
  }
};
template <class T>
struct Bfi {
  static T f(T a, T b, uint32_t c, uint32_t d) {
    const uint32_t pos = c & 255, len = d & 255;
    if (len == 0 || pos >= width<T>) return b;
    const uint64_t ones = len >= 64 ? ~uint64_t{0} : (uint64_t{1} << len) - 1;
    const T mask = static_cast<T>(ones << pos);
    return static_cast<T>((static_cast<T>(static_cast<uint64_t>(a) << pos) & mask) | (b & static_cast<T>(~mask)));
  }
};
template <class T>
struct Brev {
  static T f(T a) {
    T result = 0;
    for (uint32_t k = 0; k < width<T>; k++) result = static_cast<T>(result | ((a >> k & 1) << (width<T> - 1 - k)));
    return result;
  }
};
template <class T>
struct Popc {
  static uint32_t f(T a) { return static_cast<uint32_t>(__builtin_popcountll(static_cast<std::make_unsigned_t<T>>(a))); }
};
template <class T>
uint32_t leading_zeros(T a) {
  return a == 0 ? width<T> : static_cast<uint32_t>(__builtin_clzll(a)) - (64 - width<T>);
}
template <class T>
struct Clz {
  static uint32_t f(T a) { return leading_zeros(static_cast<std::make_unsigned_t<T>>(a)); }
};
template <class T, bool shift_amount>
uint32_t bfind(T a) {
  const auto bits = static_cast<std::make_unsigned_t<T>>(a < 0 ? static_cast<T>(~a) : a);
  if (bits == 0) return ~uint32_t{0};
  return shift_amount ? leading_zeros(bits) : width<T> - 1 - leading_zeros(bits);
}
template <class T>
struct Bfind {
  static uint32_t f(T a) { return bfind<T, false>(a); }
};
template <class T>
struct BfindShift {
  static uint32_t f(T a) { return bfind<T, true>(a); }
};
// `b` bits of ones from bit `a` on; or both wrapped to 31.
template <bool wrap>
uint32_t bmsk(uint32_t a, uint32_t b) {
  if (wrap) a &= 31, b &= 31;
  const uint32_t ones = b >= 32 ? ~uint32_t{0} : (uint32_t{1} << b) - 1;
  return a >= 32 ? 0 : ones << a;
}

uint32_t byte_of(uint64_t both, uint32_t k) { return static_cast<uint32_t>(both >> (8 * (k & 7))) & 255; }
uint32_t prmt(uint32_t a, uint32_t b, uint32_t c) {
  const uint64_t both = (uint64_t{b} << 32) | a;
  uint32_t result = 0;
  for (uint32_t k = 0; k < 4; k++) {
    const uint32_t pick = c >> (4 * k) & 15, byte = byte_of(both, pick);
    result |= (pick & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * k);
  }
  return result;
}
// The modes' choice of a byte, for each byte of the result and each control: f4e, b4e, rc8, ecl, ecr, rc16.
template <int mode>
uint32_t prmt_mode(uint32_t a, uint32_t b, uint32_t c) {
  const uint64_t both = (uint64_t{b} << 32) | a;
  const uint32_t n = c & 3;
  uint32_t result = 0;
  for (uint32_t k = 0; k < 4; k++) {
    const uint32_t pick = mode == 0   ? n + k
                          : mode == 1 ? n + 8 - k
                          : mode == 2 ? n
                          : mode == 3 ? (k > n ? k : n)
                          : mode == 4 ? (k < n ? k : n)
                                      : (n & 1) * 2 + (k & 1);
    result |= byte_of(both, pick) << (8 * k);
  }
  return result;
}

uint32_t look_up(uint32_t a, uint32_t b, uint32_t c, uint64_t table) {
  uint32_t result = 0;
  for (uint32_t k = 0; k < 8; k++) {
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return result;
}
// lop3: detail[0] is 1 or 2 for d|p with "and" or "or".
Outcome lop3(Warp &w, const Instruction &i, Lanes lanes) {
  uint64_t room[6][32];
  const uint64_t *a = values(w, i.operands[1], room[0]), *b = values(w, i.operands[2], room[1]),
                 *c = values(w, i.operands[3], room[2]);
  const Operand &to = i.operands[0];
  const uint64_t *q = i.detail[0] ? values(w, i.operands[5], room[3]) : room[3];
  uint64_t *d = target(w, i.detail[0] ? to.items[0] : to, room[4]), *p = i.detail[0] ? target(w, to.items[1], room[5]) : room[5];
  const uint64_t table = i.operands[4].bits;
  each(lanes, [&](int lane) {
    const uint32_t x =
        look_up(static_cast<uint32_t>(a[lane]), static_cast<uint32_t>(b[lane]), static_cast<uint32_t>(c[lane]), table);
    if (i.detail[0]) {
      const bool before = q[lane] & 1;
      p[lane] = i.detail[0] == 1 ? x != 0 && before : x != 0 || before;
    }
    d[lane] = x;
  });
  return Outcome::next;
}

Decoded decode_prmt(Words &words) {
  switch (words.one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"})) {
    case 0: return each_lane<prmt_mode<0>>();
    case 1: return each_lane<prmt_mode<1>>();
    case 2: return each_lane<prmt_mode<2>>();
    case 3: return each_lane<prmt_mode<3>>();
    case 4: return each_lane<prmt_mode<4>>();
    case 5: return each_lane<prmt_mode<5>>();
    default: return each_lane<prmt>();
  }
}

Decoded decode_funnel(Words &words) {
  const int left = words.one_of({"r", "l"}), wrap = words.one_of({"clamp", "wrap"});
  words.take("b32");
  if (left == 1) return wrap == 1 ? each_lane<funnel<true, true>>() : each_lane<funnel<true, false>>();
  return wrap == 1 ? each_lane<funnel<false, true>>() : each_lane<funnel<false, false>>();
}

Decoded decode_lop3(Instruction &i, Words &words) {
  i.detail[0] = words.one_of({"and", "or"}) + 1;
  words.take("b32");
  const bool has_pair = i.operands.size() > 4 && i.operands[0].kind == Operand::vector;
  if (i.operands.size() < 5 || i.operands[4].kind != Operand::number || has_pair != (i.detail[0] != 0)) return {};
  return {lop3, i.detail[0] ? size_t{6} : size_t{5}};
}

}  // namespace

Decoded decode_bits(Instruction &i, const std::string &op, Words &words) {
  if (op == "lop3") return decode_lop3(i, words);
  if (op == "shf") return decode_funnel(words);
  if (op == "bmsk") {
    const int wrap = words.one_of({"clamp", "wrap"});
    words.take("b32");
    return wrap == 1 ? each_lane<bmsk<true>>() : each_lane<bmsk<false>>();
  }
  const bool shift_amount = words.take("shiftamt");
  const Type t = words.type();
  if (op == "prmt") return decode_prmt(words);
  if (op == "and") return t == Type::pred ? each_lane<and_pred>() : for_integers<And>(t);
  if (op == "or") return t == Type::pred ? each_lane<or_pred>() : for_integers<Or>(t);
  if (op == "xor") return t == Type::pred ? each_lane<xor_pred>() : for_integers<Xor>(t);
  if (op == "not") return t == Type::pred ? each_lane<not_pred>() : for_integers<Not>(t);
  if (op == "cnot") return for_integers<Cnot>(t);
  if (op == "shl") return for_integers<Shl>(t);
  if (op == "shr") return for_integers<Shr>(t);
  if (op == "bfe") return for_integers<Bfe>(t);
  if (op == "bfi") return for_integers<Bfi>(t);
  if (op == "brev") return for_integers<Brev>(t);
  if (op == "popc") return for_integers<Popc>(t);
  if (op == "clz") return for_integers<Clz>(t);
  if (op == "bfind") return shift_amount ? for_integers<BfindShift>(t) : for_integers<Bfind>(t);
  return {};
}

}  // namespace ptx
