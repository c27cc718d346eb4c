// mov: registers, immediates, addresses of symbols, special registers; packing and unpacking.
#include "scalar.h"

namespace ptx {
namespace {

template <class T>
T same(T a) {
  return a;
}

// detail[0]: bits of an element.
Outcome pack(Warp &w, const Instruction &i, Lanes lanes) {
  uint64_t room[5][32];
  uint64_t *d = target(w, i.operands[0], room[4]);
  const std::vector<Operand> &items = i.operands[1].items;
  const uint64_t *parts[4];
  for (size_t k = 0; k < items.size(); k++) parts[k] = values(w, items[k], room[k]);
  const int bits = i.detail[0];
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  each(lanes, [&](int lane) {
    uint64_t whole = 0;
    for (size_t k = 0; k < items.size(); k++) whole |= (parts[k][lane] & mask) << (bits * static_cast<int>(k));
    d[lane] = whole;
  });
  return Outcome::next;
}
Outcome unpack(Warp &w, const Instruction &i, Lanes lanes) {
  uint64_t room[5][32];
  const uint64_t *a = values(w, i.operands[1], room[4]);
  const std::vector<Operand> &items = i.operands[0].items;
  uint64_t *parts[4];
  for (size_t k = 0; k < items.size(); k++) parts[k] = target(w, items[k], room[k]);
  const int bits = i.detail[0];
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  each(lanes, [&](int lane) {
    const uint64_t whole = a[lane];
    for (size_t k = 0; k < items.size(); k++) parts[k][lane] = whole >> (bits * static_cast<int>(k)) & mask;
  });
  return Outcome::next;
}

}  // namespace

Decoded decode_move(Instruction &i, const std::string &op, Words &words) {
  if (op != "mov") return {};
  const Type t = words.type();
  if (i.operands.size() != 2) return {};
  const Operand &to = i.operands[0], &from = i.operands[1];
  const bool packs = from.kind == Operand::vector, unpacks = to.kind == Operand::vector;
  if (packs || unpacks) {
    const size_t parts = (packs ? from : to).items.size();
    if (packs == unpacks || (parts != 2 && parts != 4)) return {};
    i.detail[0] = bits_of(t) / static_cast<int>(parts);
    return i.detail[0] < 8 ? Decoded{} : Decoded{packs ? pack : unpack, 2};
  }
  set_float_numbers(i, t);
  switch (bits_of(t)) {
    case 1: return each_lane<same<Pred>>();
    case 8: return each_lane<same<uint8_t>>();
    case 16: return each_lane<same<uint16_t>>();
    case 32: return each_lane<same<uint32_t>>();
    case 64: return each_lane<same<uint64_t>>();
    default: return {};
  }
}

}  // namespace ptx
