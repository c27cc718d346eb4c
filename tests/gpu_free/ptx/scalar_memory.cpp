// Loads and stores, conversions of addresses, and hints about caches, which do nothing.
#include "scalar_memory.h"

#include <cstdio>

namespace ptx {
namespace {

std::string hex(uint64_t x) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

// Offset `address` of `size` bytes, which may be given as a generic address of `window`.
unsigned char *inside(Warp &w, const Instruction &i, int lane, const char *what, unsigned char *base, size_t size,
                      uint64_t window, uint64_t address, size_t bytes) {
  if ((address & window_mask) == window) address &= ~window_mask;
  if (address % bytes)
    w.fail(i, lane, std::string(what) + " address " + hex(address) + " is no multiple of " + std::to_string(bytes));
  if (bytes > size || address > size - bytes)
    w.fail(i, lane, std::string(what) + " address " + hex(address) + " is outside of " + std::to_string(size) + " bytes");
  return base + address;
}

unsigned char *in_shared(Warp &w, const Instruction &i, int lane, uint64_t address, size_t bytes, bool write) {
  Shared &shared = w.block.shared;
  unsigned char *p = w.block.shared_at(w, i, lane, address, bytes, bytes);
  if (write) {
    const size_t first = static_cast<size_t>(p - shared.bytes.data()) / 16,
                 last = (static_cast<size_t>(p - shared.bytes.data()) + bytes - 1) / 16;
    for (size_t granule = first; granule <= last; granule++) shared.unfenced[granule] = 1;
  }
  return p;
}

}  // namespace

unsigned char *checked(Warp &w, const Instruction &i, int lane, Space space, uint64_t address, size_t bytes, bool write) {
  if (space == Space::generic) space = space_of(address);
  switch (space) {
    case Space::shared: return in_shared(w, i, lane, address, bytes, write);
    case Space::local: {
      const size_t size = w.block.grid.function.local;
      unsigned char *base = w.block.local.data() + static_cast<size_t>(w.thread(lane)) * size;
      return inside(w, i, lane, "local", base, size, local_window, address, bytes);
    }
    case Space::parameter: {
      std::vector<unsigned char> &all = w.block.grid.parameters;
      if (write) w.fail(i, lane, "a store to a kernel's parameters");
      return inside(w, i, lane, "parameter", all.data(), all.size(), param_window, address, bytes);
    }
    default: break;
  }
  if (space_of(address) != Space::global) w.fail(i, lane, "address " + hex(address) + " is not of global memory");
  if (address < null_page) w.fail(i, lane, "address " + hex(address) + " is null");
  if (address % bytes) w.fail(i, lane, "address " + hex(address) + " is no multiple of " + std::to_string(bytes));
  check_global(w, i, lane, address, bytes, space == Space::constant);
  return reinterpret_cast<unsigned char *>(address);
}

// Clusters are single blocks. What says nothing and is strong nevertheless, volatile or atomic, is of a larger scope.
int take_scope(Words &words) {
  const int which = words.one_of({"cta", "cluster", "gpu", "gl", "sys"});
  return which == 0 || which == 1 ? 0 : Races::far;
}

// Values are those of the strongest order, whatever it says: threads here see memory as one.
int take_order(Words &words, Instruction &i, Races::Order plain) {
  words.take("weak");
  const int scope = take_scope(words), which = words.one_of({"volatile", "relaxed", "mmio", "acquire", "release", "acq_rel"});
  int order = which < 0 ? plain : Races::strong;
  if (which == 3 || which == 5) order |= Races::acquires;
  if (which == 4 || which == 5) order |= Races::releases;
  if (order == Races::weak) return order;
  i.orders_blocks = scope != 0 && order != Races::strong;
  return order | scope;
}

Space take_space(Words &words) {
  switch (words.one_of(
      {"global", "const", "param", "param::entry", "param::func", "local", "shared", "shared::cta", "shared::cluster"})) {
    case 0: return Space::global;
    case 1: return Space::constant;
    case 2:
    case 3:
    case 4: return Space::parameter;
    case 5: return Space::local;
    case 6:
    case 7:
    case 8: return Space::shared;
    default: return Space::generic;
  }
}

namespace {

// detail of ld and st: [0] Space, [1] elements, [2] whether elements are signed, [3] of Races::Order.
template <class T>
Outcome load(Warp &w, const Instruction &i, Lanes lanes) {
  Races *const races = w.block.races.get();
  const auto space = static_cast<Space>(i.detail[0]);
  const auto count = static_cast<size_t>(i.detail[1]);
  const bool extend = i.detail[2] != 0;
  const Operand &to = i.operands[0], &from = i.operands[1];
  const Operand *items = to.kind == Operand::vector ? to.items.data() : &to;
  uint64_t room[32], *registers[8];
  for (size_t k = 0; k < count; k++) registers[k] = target(w, items[k], room);
  const Addresses addresses(w, from);
  each(lanes, [&](int lane) {
    const unsigned char *p = located(w, i, lane, space, addresses[lane], sizeof(T) * count, false);
    if (races) races->access(w, i, lane, p, sizeof(T) * count, Races::reads, i.detail[3], nullptr, count);
    for (size_t k = 0; k < count; k++) {
      T value;
      std::memcpy(&value, p + k * sizeof(T), sizeof(T));
      registers[k][lane] = extend ? extended(value, sizeof(T) * 8, items[k].width) : value;
    }
  });
  return Outcome::next;
}
template <class T>
Outcome store(Warp &w, const Instruction &i, Lanes lanes) {
  Races *const races = w.block.races.get();
  const auto space = static_cast<Space>(i.detail[0]);
  const auto count = static_cast<size_t>(i.detail[1]);
  const Operand &to = i.operands[0], &from = i.operands[1];
  const Operand *items = from.kind == Operand::vector ? from.items.data() : &from;
  uint64_t room[8][32];
  const uint64_t *registers[8];
  for (size_t k = 0; k < count; k++) registers[k] = values(w, items[k], room[k]);
  const Addresses addresses(w, to);
  each(lanes, [&](int lane) {
    unsigned char *p = located(w, i, lane, space, addresses[lane], sizeof(T) * count, true);
    T given[8];
    for (size_t k = 0; k < count; k++) given[k] = static_cast<T>(registers[k][lane]);
    if (races) races->access(w, i, lane, p, sizeof(T) * count, Races::writes, i.detail[3], given, count);
    std::memcpy(p, given, count * sizeof(T));
  });
  return Outcome::next;
}

Decoded decode_access(Instruction &i, bool loads, Words &words) {
  i.detail[3] = take_order(words, i);
  words.ignore({"nc", "unified"});
  words.ignore({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  const bool policy = words.take("L2::cache_hint");
  words.ignore_prefix("L1::");
  words.ignore_prefix("L2::");
  i.detail[0] = static_cast<int>(take_space(words));
  const int vector = words.one_of({"v2", "v4", "v8"});
  const size_t count = size_t{1} << (vector + 1);
  const Type t = words.type();
  i.detail[1] = static_cast<int>(count);
  i.detail[2] = is_signed(t);
  if (i.operands.size() < 2) return {};
  const Operand &memory = i.operands[loads ? 1 : 0], &value = i.operands[loads ? 0 : 1];
  if (memory.kind != Operand::memory) return {};
  // Triton writes a single value as a vector of one.
  if ((value.kind == Operand::vector ? value.items.size() : 1) != count) return {};
  if (!loads) set_float_numbers(i, t);
  const size_t operands = policy ? 3 : 2;
  switch (bits_of(t)) {
    case 8: return {loads ? load<uint8_t> : store<uint8_t>, operands};
    case 16: return {loads ? load<uint16_t> : store<uint16_t>, operands};
    case 32: return {loads ? load<uint32_t> : store<uint32_t>, operands};
    case 64: return {loads ? load<uint64_t> : store<uint64_t>, operands};
    default: return {};
  }
}

uint64_t window_of(Space space) {
  return space == Space::shared      ? shared_window
         : space == Space::local     ? local_window
         : space == Space::parameter ? param_window
                                     : 0;
}

// detail: [0] Space, [1] whether to the space, [2] bits of an address.
Outcome cvta(Warp &w, const Instruction &i, Lanes lanes) {
  const auto space = static_cast<Space>(i.detail[0]);
  const uint64_t window = window_of(space);
  uint64_t room[2][32];
  const uint64_t *a = values(w, i.operands[1], room[0]);
  uint64_t *d = target(w, i.operands[0], room[1]);
  each(lanes, [&](int lane) {
    const uint64_t address = a[lane];
    if (window && i.detail[1]) {
      if (space_of(address) != space) w.fail(i, lane, "address " + hex(address) + " is of another space");
      d[lane] = address - window;
    } else {
      // A parameter's address may be in its window already.
      d[lane] = window && space_of(address) == space ? address : address + window;
    }
  });
  return Outcome::next;
}

Outcome isspacep(Warp &w, const Instruction &i, Lanes lanes) {
  const auto space = static_cast<Space>(i.detail[0]);
  each(lanes, [&](int lane) { w.set(i.operands[0], lane, space_of(w.get(i.operands[1], lane)) == space); });
  return Outcome::next;
}

Outcome nothing(Warp &, const Instruction &, Lanes) { return Outcome::next; }

// detail: [0] its scope.
Outcome fence(Warp &w, const Instruction &i, Lanes lanes) {
  if (w.block.races) w.block.races->fence(w, lanes, i.detail[0] != 0);
  return Outcome::next;
}

Outcome zero(Warp &w, const Instruction &i, Lanes lanes) {
  each(lanes, [&](int lane) { w.set(i.operands[0], lane, 0); });
  return Outcome::next;
}

}  // namespace

Decoded decode_memory(Instruction &i, const std::string &op, Words &words) {
  if (op == "ld" || op == "st" || op == "ldu") return decode_access(i, op != "st", words);
  if (op == "cvta") {
    i.detail[1] = words.take("to");
    const Space space = take_space(words);
    i.detail[0] = static_cast<int>(space);
    // An address of 32 bits has no room for a window.
    return words.type() == Type::u64 && space != Space::generic ? Decoded{cvta, 2} : Decoded{};
  }
  if (op == "isspacep") {
    const Space space = take_space(words);
    i.detail[0] = static_cast<int>(space);
    return space == Space::constant || space == Space::generic ? Decoded{} : Decoded{isspacep, 2};
  }
  if (op == "createpolicy") {
    words.ignore({"fractional", "range", "cvt", "global", "b64"});
    words.ignore_prefix("L2::");
    return {zero, i.operands.size()};
  }
  if (op == "prefetch" || op == "prefetchu" || op == "applypriority" || op == "discard") {
    words.ignore({"global", "local", "L1", "L2", "const", "param", "tensormap"});
    words.ignore_prefix("L2::");
    return {nothing, i.operands.size()};
  }
  // Threads see memory as one. Fences of the asynchronous proxy and of mbarriers have words that are not among these.
  if (op == "fence" || op == "membar") {
    words.ignore({"sc", "acq_rel", "acquire", "release"});
    i.detail[0] = take_scope(words);
    i.orders_blocks = i.detail[0] != 0 && words.empty();
    return {fence, 0};
  }
  return {};
}

}  // namespace ptx
