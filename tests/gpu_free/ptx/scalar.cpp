// Instructions that threads execute each for itself, and those that need no more of a block than its barriers.
#include "scalar.h"

namespace ptx {

namespace {

constexpr struct {
  const char *name;
  Type type;
  int bits;
} types[] = {
    {"pred", Type::pred, 1}, {"b8", Type::b8, 8},    {"b16", Type::b16, 16},       {"b32", Type::b32, 32},
    {"b64", Type::b64, 64},  {"u8", Type::u8, 8},    {"u16", Type::u16, 16},       {"u32", Type::u32, 32},
    {"u64", Type::u64, 64},  {"s8", Type::s8, 8},    {"s16", Type::s16, 16},       {"s32", Type::s32, 32},
    {"s64", Type::s64, 64},  {"f16", Type::f16, 16}, {"bf16", Type::bf16, 16},     {"f16x2", Type::f16x2, 32},
    {"f32", Type::f32, 32},  {"f64", Type::f64, 64}, {"bf16x2", Type::bf16x2, 32}, {"tf32", Type::tf32, 32},
};

using Decode = Decoded (*)(Instruction &, const std::string &, Words &);
constexpr Decode decoders[] = {decode_integer, decode_bits,   decode_float,  decode_half,    decode_compare, decode_convert,
                               decode_move,    decode_memory, decode_atomic, decode_control, decode_barrier, decode_warp};

}  // namespace

int bits_of(Type type) {
  for (const auto &t : types) {
    if (t.type == type) return t.bits;
  }
  return 0;
}

bool Words::take(const std::string &word) {
  for (size_t k = 0; k < left_.size(); k++) {
    if (left_[k] != word) continue;
    left_.erase(left_.begin() + static_cast<std::ptrdiff_t>(k));
    return true;
  }
  return false;
}

void Words::ignore_prefix(const std::string &prefix) {
  for (size_t k = left_.size(); k-- > 0;) {
    if (left_[k].compare(0, prefix.size(), prefix) == 0) left_.erase(left_.begin() + static_cast<std::ptrdiff_t>(k));
  }
}

int Words::one_of(std::initializer_list<const char *> words) {
  int which = 0;
  for (const char *word : words) {
    if (take(word)) return which;
    which++;
  }
  return -1;
}

Type Words::type() {
  for (size_t k = 0; k < left_.size(); k++) {
    for (const auto &t : types) {
      if (left_[k] != t.name) continue;
      left_.erase(left_.begin() + static_cast<std::ptrdiff_t>(k));
      return t.type;
    }
  }
  return Type::none;
}

namespace {

void set_float_number(Operand &o, Type type) {
  for (Operand &item : o.items) set_float_number(item, type);
  if (o.kind != Operand::number || o.text.empty()) return;
  const std::string digits = o.text.substr(o.text[0] == '-' ? 1 : 0), prefix = digits.substr(0, 2);
  const bool single = prefix == "0f" || prefix == "0F";
  const bool hex = prefix == "0x" || prefix == "0X" || single;
  const bool wide = prefix == "0d" || prefix == "0D" || (!hex && digits.find_first_of(".eE") != std::string::npos);
  if (type == Type::f32 && wide) o.bits = to_bits(static_cast<float>(from_bits<double>(o.bits)));
  if (type == Type::f64 && single) o.bits = to_bits(static_cast<double>(from_bits<float>(o.bits)));
}

}  // namespace

void set_float_numbers(Instruction &i, Type type) {
  for (Operand &o : i.operands) {
    if (o.kind != Operand::memory) set_float_number(o, type);
  }
}

bool decode_scalar(Instruction &i) {
  for (const Decode decode : decoders) {
    Words words(i);
    const Decoded decoded = decode(i, i.words[0], words);
    if (!decoded.execute || !words.empty() || decoded.operands != i.operands.size()) continue;
    i.execute = decoded.execute;
    return true;
  }
  return false;
}

}  // namespace ptx
