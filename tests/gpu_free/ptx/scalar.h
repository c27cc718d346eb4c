// What the files scalar_*.cpp share: decoding of the modifiers, values of registers as C++ types, loops over lanes.
//
// These files are compiled with -ffp-contract=off: a product and a sum that PTX wrote apart are rounded twice.
#ifndef PTX_SCALAR_H
#define PTX_SCALAR_H

#include <cstring>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "machine.h"

namespace ptx {

// ---- decoding ----

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f16x2,
  bf16x2,
  tf32,
  f32,
  f64
};

int bits_of(Type);
inline bool is_signed(Type t) { return t >= Type::s8 && t <= Type::s64; }
inline bool is_float(Type t) { return t >= Type::f16; }

// An instruction's modifiers. Whoever understands one takes it; one that nobody took is not understood, so neither is the
// instruction.
class Words {
 public:
  explicit Words(const Instruction &i) : left_(i.words.begin() + 1, i.words.end()) {}
  bool take(const std::string &word);
  void ignore(std::initializer_list<const char *> words) {
    for (const char *word : words) take(word);
  }
  void ignore_prefix(const std::string &prefix);  // "L2::"
  // Which of these is there: 0, 1, ...; -1 if none.
  int one_of(std::initializer_list<const char *> words);
  Type type();  // the first that is a type
  bool empty() const { return left_.empty(); }

 private:
  std::vector<std::string> left_;
};

// How to execute an instruction, and the operands that it must have.
struct Decoded {
  Execute execute = nullptr;
  size_t operands = 0;
};

Decoded decode_integer(Instruction &, const std::string &op, Words &);
Decoded decode_bits(Instruction &, const std::string &op, Words &);
Decoded decode_float(Instruction &, const std::string &op, Words &);
Decoded decode_half(Instruction &, const std::string &op, Words &);
Decoded decode_compare(Instruction &, const std::string &op, Words &);
Decoded decode_convert(Instruction &, const std::string &op, Words &);
Decoded decode_move(Instruction &, const std::string &op, Words &);
Decoded decode_memory(Instruction &, const std::string &op, Words &);
Decoded decode_atomic(Instruction &, const std::string &op, Words &);
Decoded decode_control(Instruction &, const std::string &op, Words &);
Decoded decode_barrier(Instruction &, const std::string &op, Words &);
Decoded decode_warp(Instruction &, const std::string &op, Words &);

// Immediates of float instructions, "1.0" or "0f3F800000": as bits of `type`.
void set_float_numbers(Instruction &, Type type);

// ---- registers ----

struct Pred {
  bool value;
  operator bool() const { return value; }
};

template <class T>
T from_bits(uint64_t bits) {
  if constexpr (std::is_same_v<T, Pred>) {
    return Pred{(bits & 1) != 0};
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(bits);
  } else {
    T value;
    std::memcpy(&value, &bits, sizeof value);  // little-endian: the low bytes
    return value;
  }
}

template <class T>
uint64_t to_bits(T value) {
  if constexpr (std::is_same_v<T, Pred>) {
    return value.value;
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<std::make_unsigned_t<T>>(value);
  } else {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
  }
}

// A value of `bits` bits, sign-extended to a register of `width`.
inline uint64_t extended(uint64_t value, int bits, int width) {
  const int up = 64 - bits;
  value = static_cast<uint64_t>(static_cast<int64_t>(value << up) >> up);
  return width < 64 ? value & ((uint64_t{1} << width) - 1) : value;
}

// The 32 lanes' values of an operand: where its register is, or `room`, filled.
inline const uint64_t *values(const Warp &w, const Operand &o, uint64_t *room) {
  if (o.kind == Operand::reg) {
    const uint64_t *p = &w.registers[static_cast<size_t>(o.slot) * 32];
    if (!o.negated) return p;
    for (int lane = 0; lane < 32; lane++) room[lane] = p[lane] ^ 1;
  } else if (o.kind == Operand::number) {
    const uint64_t bits = o.bits ^ (o.negated ? 1 : 0);
    for (int lane = 0; lane < 32; lane++) room[lane] = bits;
  } else {
    for (int lane = 0; lane < 32; lane++) room[lane] = w.get(o, lane);
  }
  return room;
}

// Where an operand's 32 values go: `room` if nowhere.
inline uint64_t *target(Warp &w, const Operand &o, uint64_t *room) { return o.kind == Operand::reg ? &w.at(o.slot, 0) : room; }

template <class F>
inline void each(Lanes lanes, F f) {
  if (lanes == ~Lanes{0}) {
    for (int lane = 0; lane < 32; lane++) f(lane);
  } else {
    for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}

// Runs R f(A, B, ...) as d = f(a, b, ...).
template <auto f>
struct Each;
template <class R, class... A, R (*f)(A...)>
struct Each<f> {
  template <size_t... k>
  static void run(Warp &w, const Instruction &i, Lanes lanes, std::index_sequence<k...>) {
    uint64_t room[sizeof...(A) + 1][32];
    const uint64_t *sources[] = {values(w, i.operands[k + 1], room[k])...};
    uint64_t *d = target(w, i.operands[0], room[sizeof...(A)]);
    if (lanes != ~Lanes{0}) {
      each(lanes, [&](int lane) { d[lane] = to_bits<R>(f(from_bits<A>(sources[k][lane])...)); });
      return;
    }
    // Registers are the same or apart, so that no lane writes what another reads.
#pragma GCC ivdep
    for (int lane = 0; lane < 32; lane++) d[lane] = to_bits<R>(f(from_bits<A>(sources[k][lane])...));
  }
  // Not inlined, so that a rounding mode set around the call holds for all of it.
  __attribute__((noinline)) static Outcome execute(Warp &w, const Instruction &i, Lanes lanes) {
    run(w, i, lanes, std::index_sequence_for<A...>());
    return Outcome::next;
  }
};
template <class R, class... A>
constexpr size_t operands_of(R (*)(A...)) {
  return sizeof...(A) + 1;
}
template <auto f>
Decoded each_lane() {
  return {Each<f>::execute, operands_of(f)};
}

// Op<T>::f for the C++ type of an integer or bit-size type.
template <template <class> class Op>
Decoded for_integers(Type t) {
  switch (t) {
    case Type::b16:
    case Type::u16: return each_lane<Op<uint16_t>::f>();
    case Type::b32:
    case Type::u32: return each_lane<Op<uint32_t>::f>();
    case Type::b64:
    case Type::u64: return each_lane<Op<uint64_t>::f>();
    case Type::s16: return each_lane<Op<int16_t>::f>();
    case Type::s32: return each_lane<Op<int32_t>::f>();
    case Type::s64: return each_lane<Op<int64_t>::f>();
    default: return {};
  }
}

}  // namespace ptx

#endif
