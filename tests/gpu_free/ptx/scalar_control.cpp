// Jumps and ends.
#include "scalar.h"

namespace ptx {
namespace {

Outcome bra(Warp &w, const Instruction &i, Lanes lanes) {
  const int to = i.operands[0].slot;
  each(lanes, [&](int lane) { w.pc[lane] = to; });
  return Outcome::jumped;
}

// brx.idx index, {labels}
Outcome brx(Warp &w, const Instruction &i, Lanes lanes) {
  const std::vector<Operand> &labels = i.operands[1].items;
  each(lanes, [&](int lane) {
    const auto index = static_cast<uint32_t>(w.get(i.operands[0], lane));
    if (index >= labels.size()) w.fail(i, lane, "no target " + std::to_string(index));
    w.pc[lane] = labels[index].slot;
  });
  return Outcome::jumped;
}

Outcome leave(Warp &, const Instruction &, Lanes) { return Outcome::exited; }
Outcome trap(Warp &w, const Instruction &i, Lanes lanes) { w.fail(i, __builtin_ctz(lanes), "trapped"); }
Outcome nothing(Warp &, const Instruction &, Lanes) { return Outcome::next; }

}  // namespace

Decoded decode_control(Instruction &i, const std::string &op, Words &words) {
  if (op == "bra") {
    words.take("uni");
    return i.operands.size() == 1 && i.operands[0].kind == Operand::label ? Decoded{bra, 1} : Decoded{};
  }
  if (op == "brx" && words.take("idx")) {
    words.take("uni");
    return i.operands.size() == 2 && i.operands[1].kind == Operand::vector ? Decoded{brx, 2} : Decoded{};
  }
  if (op == "exit") return {leave, 0};
  if (op == "ret") {
    words.take("uni");
    return {leave, 0};
  }
  if (op == "trap" || op == "brkpt") return {trap, 0};
  if (op == "nanosleep") {
    words.take("u32");
    return {nothing, 1};
  }
  if (op == "pmevent") {
    words.take("mask");
    return {nothing, 1};
  }
  return {};
}

}  // namespace ptx
