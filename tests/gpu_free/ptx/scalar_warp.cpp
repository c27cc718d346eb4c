// What the lanes of a warp do together: .sync instructions with a mask of members.
#include "races.h"
#include "scalar_number.h"

namespace ptx {
namespace {

// Calls run(members) for each group of lanes that name the same mask, once all of it that live have come. The others
// wait for theirs.
template <class F>
Outcome together(Warp &w, const Instruction &i, Lanes lanes, const Operand &mask, F run) {
  // Most often: all lanes that live, and a mask that says so.
  if (mask.kind == Operand::number && (mask.bits & w.live) == lanes) {
    run(lanes);
    return Outcome::next;
  }
  uint64_t room[32], masks[32];
  std::memcpy(masks, values(w, mask, room), sizeof masks);  // what run() writes may be in the same register
  each(lanes, [&](int lane) {
    if (!(masks[lane] >> lane & 1)) w.fail(i, lane, "is not in its own mask of members");
  });
  Lanes done = 0;
  for (Lanes rest = lanes; rest;) {
    const int lane = __builtin_ctz(rest);
    const auto named = static_cast<Lanes>(masks[lane]);
    const Lanes members = named & w.live;
    Lanes agree = 0;
    each(members & lanes, [&](int k) { agree |= Lanes{static_cast<Lanes>(masks[k]) == named} << k; });
    if (agree == members) {
      run(members);
      done |= members;
    }
    rest &= ~(agree | Lanes{1} << lane);
  }
  if (done == lanes) return Outcome::next;
  if (!done) return Outcome::wait;
  each(done, [&](int lane) { w.pc[lane]++; });
  return Outcome::jumped;
}

Outcome meet(Warp &w, const Instruction &i, Lanes lanes) {
  return together(w, i, lanes, i.operands[0], [&](Lanes members) {
    if (w.block.races) w.block.races->meet(w, members);
  });
}

// detail[0] of shfl: up, down, bfly, idx. d|p, a, b, c, mask.
Outcome shfl(Warp &w, const Instruction &i, Lanes lanes) {
  const Operand &to = i.operands[0];
  const bool pair = to.kind == Operand::vector;
  return together(w, i, lanes, i.operands[4], [&](Lanes members) {
    uint64_t room[5][32], source[32];
    std::memcpy(source, values(w, i.operands[1], room[0]), sizeof source);
    const uint64_t *b = values(w, i.operands[2], room[1]), *c = values(w, i.operands[3], room[2]);
    uint64_t *d = target(w, pair ? to.items[0] : to, room[3]), *p = pair ? target(w, to.items[1], room[4]) : room[4];
    int from[32];
    bool inside[32];
    each(members, [&](int lane) {
      const int offset = static_cast<int>(b[lane] & 31), clamp = static_cast<int>(c[lane] & 31),
                segment = static_cast<int>(c[lane] >> 8 & 31);
      const int first = lane & segment, last = first | (clamp & ~segment);
      int j = lane;
      switch (i.detail[0]) {
        case 0: j = lane - offset, inside[lane] = j >= last; break;
        case 1: j = lane + offset, inside[lane] = j <= last; break;
        case 2: j = lane ^ offset, inside[lane] = j <= last; break;
        default: j = first | (offset & ~segment), inside[lane] = j <= last;
      }
      from[lane] = inside[lane] ? j : lane;
      if (!(members >> from[lane] & 1))
        w.fail(i, lane, "reads a register of lane " + std::to_string(from[lane]) + ", which does not take part");
    });
    each(members, [&](int lane) {
      d[lane] = source[from[lane]] & 0xffffffff;
      p[lane] = inside[lane];
    });
  });
}

// detail[0] of vote: all, any, uni, ballot. d, {!}a, mask.
Outcome vote(Warp &w, const Instruction &i, Lanes lanes) {
  return together(w, i, lanes, i.operands[2], [&](Lanes members) {
    uint64_t room[32];
    const uint64_t *a = values(w, i.operands[1], room);
    Lanes yes = 0;
    each(members, [&](int lane) { yes |= static_cast<Lanes>(a[lane] & 1) << lane; });
    const Lanes results[] = {yes == members, yes != 0, yes == 0 || yes == members, yes};
    each(members, [&](int lane) { w.set(i.operands[0], lane, results[i.detail[0]]); });
  });
}

// detail of match: [0] whether all, [1] bits. d{|p}, a, mask.
Outcome match(Warp &w, const Instruction &i, Lanes lanes) {
  return together(w, i, lanes, i.operands[2], [&](Lanes members) {
    const Operand &to = i.operands[0];
    const bool pair = to.kind == Operand::vector;
    uint64_t room[32], a[32];
    const uint64_t *source = values(w, i.operands[1], room);
    each(members, [&](int lane) { a[lane] = i.detail[1] == 32 ? static_cast<uint32_t>(source[lane]) : source[lane]; });
    each(members, [&](int lane) {
      Lanes same = 0;
      each(members, [&](int k) { same |= static_cast<Lanes>(a[k] == a[lane]) << k; });
      const bool all = same == members;
      w.set(pair ? to.items[0] : to, lane, i.detail[0] && !all ? 0 : same);
      if (pair) w.set(to.items[1], lane, all);
    });
  });
}

// elect.sync d|p, mask: the first lane.
Outcome elect(Warp &w, const Instruction &i, Lanes lanes) {
  return together(w, i, lanes, i.operands[1], [&](Lanes members) {
    const int leader = __builtin_ctz(members);
    each(members, [&](int lane) {
      w.set(i.operands[0].items[0], lane, static_cast<uint64_t>(leader));
      w.set(i.operands[0].items[1], lane, lane == leader);
    });
  });
}

template <class T>
T reduced(int how, T a, T b) {
  switch (how) {
    case 0: return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
    case 1: return a < b ? a : b;
    case 2: return a > b ? a : b;
    case 3: return a & b;
    case 4: return a | b;
    default: return a ^ b;
  }
}
// detail[0] of redux: add, min, max, and, or, xor. d, a, mask.
template <class T>
Outcome redux(Warp &w, const Instruction &i, Lanes lanes) {
  return together(w, i, lanes, i.operands[2], [&](Lanes members) {
    uint64_t room[32];
    const uint64_t *a = values(w, i.operands[1], room);
    const int first = __builtin_ctz(members);
    T result = from_bits<T>(a[first]);
    each(members & ~(Lanes{1} << first), [&](int lane) { result = reduced(i.detail[0], result, from_bits<T>(a[lane])); });
    each(members, [&](int lane) { w.set(i.operands[0], lane, to_bits(result)); });
  });
}

Outcome activemask(Warp &w, const Instruction &i, Lanes lanes) {
  each(lanes, [&](int lane) { w.set(i.operands[0], lane, lanes); });
  return Outcome::next;
}

}  // namespace

Decoded decode_warp(Instruction &i, const std::string &op, Words &words) {
  if (op == "activemask") return words.take("b32") ? Decoded{activemask, 1} : Decoded{};
  if (!words.take("sync")) return {};
  if (op == "bar") return words.take("warp") ? Decoded{meet, 1} : Decoded{};
  if (op == "shfl") {
    i.detail[0] = words.one_of({"up", "down", "bfly", "idx"});
    return words.take("b32") && i.detail[0] >= 0 ? Decoded{shfl, 5} : Decoded{};
  }
  if (op == "vote") {
    i.detail[0] = words.one_of({"all", "any", "uni", "ballot"});
    return words.take(i.detail[0] == 3 ? "b32" : "pred") && i.detail[0] >= 0 ? Decoded{vote, 3} : Decoded{};
  }
  if (op == "match") {
    i.detail[0] = words.one_of({"any", "all"});
    i.detail[1] = bits_of(words.type());
    return i.detail[0] >= 0 && i.detail[1] >= 32 ? Decoded{match, 3} : Decoded{};
  }
  if (op == "elect") return i.operands[0].kind == Operand::vector ? Decoded{elect, 2} : Decoded{};
  if (op == "redux") {
    i.detail[0] = words.one_of({"add", "min", "max", "and", "or", "xor"});
    const Type t = words.type();
    const bool number = i.detail[0] < 3;
    if (i.detail[0] < 0 || (number ? t != Type::u32 && t != Type::s32 : t != Type::b32)) return {};
    return {t == Type::s32 ? redux<int32_t> : redux<uint32_t>, 3};
  }
  return {};
}

}  // namespace ptx
