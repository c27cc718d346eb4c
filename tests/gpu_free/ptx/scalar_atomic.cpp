// atom and red. Instructions are executed one after the other, so that each is atomic.
#include "scalar_memory.h"
#include "scalar_number.h"

namespace ptx {
namespace {

enum Operation { add, lesser, greater, and_, or_, xor_, exch, cas, inc, dec, operations };

float sum(float a, float b) { return canonical(a + b); }
double sum(double a, double b) { return a + b; }
Half sum(Half a, Half b) { return Half(add_to_odd(a, b)); }
Brain sum(Brain a, Brain b) { return Brain(add_to_odd(a, b)); }

template <class T>
struct Two {
  T low, high;
};
template <class T>
Two<T> sum(Two<T> a, Two<T> b) {
  return {sum(a.low, b.low), sum(a.high, b.high)};
}

template <Operation op, class T>
T combine(T old, T b, T c) {
  if constexpr (op == exch) return b;
  if constexpr (op == cas) return old == b ? c : old;
  if constexpr (op == inc) return old >= b ? 0 : old + 1;
  if constexpr (op == dec) return old == 0 || old > b ? b : old - 1;
  if constexpr (op == lesser) return old < b ? old : b;
  if constexpr (op == greater) return old > b ? old : b;
  if constexpr (op == and_) return old & b;
  if constexpr (op == or_) return old | b;
  if constexpr (op == xor_) return old ^ b;
  if constexpr (op == add && std::is_integral_v<T>) return static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(b));
  if constexpr (op == add && !std::is_integral_v<T>) return sum(old, b);
}

// detail: [0] Space, [1] whether there is a destination, [2] of Races::Order.
template <Operation op, class T>
Outcome atomic(Warp &w, const Instruction &i, Lanes lanes) {
  const auto space = static_cast<Space>(i.detail[0]);
  const size_t first = i.detail[1] ? 1 : 0;
  const Operand &memory = i.operands[first];
  uint64_t room[3][32];
  const uint64_t *b = values(w, i.operands[first + 1], room[0]);
  const uint64_t *c = op == cas ? values(w, i.operands[first + 2], room[1]) : room[1];
  uint64_t *d = first ? target(w, i.operands[0], room[2]) : room[2];
  const Addresses addresses(w, memory);
  each(lanes, [&](int lane) {
    const uint64_t address = addresses[lane];
    unsigned char *p = located(w, i, lane, space, address, sizeof(T), true);
    if (w.block.races) w.block.races->access(w, i, lane, p, sizeof(T), Races::updates, i.detail[2]);
    T old;
    std::memcpy(&old, p, sizeof(T));
    T result;
    if constexpr (op == add && std::is_same_v<T, float>) {
      // Sums of f32 in global memory flush subnormals, those in shared memory do not.
      const bool keeps = space == Space::shared || (space == Space::generic && space_of(address) == Space::shared);
      const auto addend = from_bits<float>(b[lane]);
      result = keeps ? sum(old, addend) : flushed(sum(flushed(old), flushed(addend)));
    } else {
      result = combine<op>(old, from_bits<T>(b[lane]), op == cas ? from_bits<T>(c[lane]) : T());
    }
    std::memcpy(p, &result, sizeof(T));
    d[lane] = to_bits<T>(old);
  });
  return Outcome::next;
}

template <Operation op>
Execute for_type(Type t) {
  constexpr bool bitwise = op == and_ || op == or_ || op == xor_;
  constexpr bool moves = op == exch || op == cas;
  constexpr bool numeric = op == add || op == lesser || op == greater;
  if constexpr (numeric) {
    if (t == Type::s32) return atomic<op, int32_t>;
    if (t == Type::s64) return atomic<op, int64_t>;
  }
  if constexpr (numeric || op == inc || op == dec || moves) {
    if (t == Type::u32) return atomic<op, uint32_t>;
  }
  if constexpr (numeric || moves) {
    if (t == Type::u64) return atomic<op, uint64_t>;
  }
  if constexpr (bitwise || moves) {
    if (t == Type::b32) return atomic<op, uint32_t>;
    if (t == Type::b64) return atomic<op, uint64_t>;
  }
  if constexpr (op == cas) {
    if (t == Type::b16) return atomic<op, uint16_t>;
  }
  if constexpr (op == add) {
    switch (t) {
      case Type::f32: return atomic<op, float>;
      case Type::f64: return atomic<op, double>;
      case Type::f16: return atomic<op, Half>;
      case Type::bf16: return atomic<op, Brain>;
      case Type::f16x2: return atomic<op, Two<Half>>;
      case Type::bf16x2: return atomic<op, Two<Brain>>;
      default: break;
    }
  }
  return nullptr;
}
template <int... op>
Execute for_operation(int which, Type t, std::integer_sequence<int, op...>) {
  Execute found = nullptr;
  (void)((op == which && ((found = for_type<static_cast<Operation>(op)>(t)), true)) || ...);
  return found;
}

}  // namespace

Decoded decode_atomic(Instruction &i, const std::string &op, Words &words) {
  if (op != "atom" && op != "red") return {};
  i.detail[2] = take_order(words, i, Races::strong);
  words.ignore({"noftz"});
  const bool policy = words.take("L2::cache_hint");
  const Space space = take_space(words);
  i.detail[0] = static_cast<int>(space);
  i.detail[1] = op == "atom";
  const int which = words.one_of({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  const Type t = words.type();
  if (space != Space::generic && space != Space::global && space != Space::shared) return {};
  if (op == "red" && (which == exch || which == cas)) return {};
  set_float_numbers(i, t);
  const size_t operands = size_t{2} + (op == "atom") + (which == cas) + policy;
  return {for_operation(which, t, std::make_integer_sequence<int, operations>()), operands};
}

}  // namespace ptx
