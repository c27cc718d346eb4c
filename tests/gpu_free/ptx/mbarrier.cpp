// mbarrier.*: phases of arrivals and transactions. Rules are those of the PTX manual, "mbarrier"; what it calls undefined
// is an Error.
#include "async.h"
#include "races.h"

namespace ptx {
namespace {

constexpr int64_t most = (1 << 20) - 1;  // of each count

enum Detail { counts_at, expects, drops, completes };  // of arrive: index of `count` or -1, ...

void store(Warp &w, size_t offset, const Barrier &b) {
  const uint64_t word = b.word();
  std::memcpy(w.block.shared.bytes.data() + offset, &word, 8);
}

// An access of the barrier itself: to race with its initialisation, or with what is stored over it.
void touch(Warp &w, const Instruction &in, int lane, size_t offset, Races::Kind kind, Races::Order order) {
  if (w.block.races) w.block.races->access(w, in, lane, w.block.shared.bytes.data() + offset, 8, kind, order);
}

// After a change: the phase ends when nothing is pending.
void settle(Warp &w, const Instruction &in, int lane, size_t offset, Barrier &b) {
  if (b.transactions > most || b.transactions < -most) w.fail(in, lane, "an mbarrier's tx-count is out of range");
  if (!b.pending && !b.transactions) {
    ++b.phase;
    b.pending = b.expected;
    b.observed = false;
    if (w.block.races) w.block.races->phase(offset, b.phase);
  }
  store(w, offset, b);
}

size_t offset_of(Warp &w, const Instruction &in, int lane, const Operand &address) {
  return shared_offset(w, in, lane, w.address(address, lane), 8, 8);
}

uint64_t token(const Barrier &b) { return b.phase << 20 | b.pending; }

Outcome init(Warp &w, const Instruction &in, Lanes lanes) {
  for_lanes(lanes, [&](int lane) {
    const size_t offset = offset_of(w, in, lane, in.operands[0]);
    const uint64_t count = w.get(in.operands[1], lane);
    if (count < 1 || count > most) w.fail(in, lane, "an mbarrier expects 1 to 2^20 - 1 arrivals, not " + std::to_string(count));
    Barrier b;
    b.expected = b.pending = static_cast<uint32_t>(count);
    if (!async_state(w.block).barriers.emplace(offset, b).second)
      w.fail(in, lane, "there is an mbarrier already that was not invalidated");
    touch(w, in, lane, offset, Races::writes, Races::weak);
    if (w.block.races) w.block.races->init(offset);
    store(w, offset, b);
  });
  return Outcome::next;
}

Outcome invalidate(Warp &w, const Instruction &in, Lanes lanes) {
  for_lanes(lanes, [&](int lane) {
    const size_t offset = offset_of(w, in, lane, in.operands[0]);
    barrier_at(w, in, lane, offset);
    touch(w, in, lane, offset, Races::writes, Races::weak);
    async_state(w.block).barriers.erase(offset);
  });
  return Outcome::next;
}

Outcome transactions(Warp &w, const Instruction &in, Lanes lanes) {
  for_lanes(lanes, [&](int lane) {
    const size_t offset = offset_of(w, in, lane, in.operands[0]);
    const int64_t bytes = static_cast<uint32_t>(w.get(in.operands[1], lane));
    touch(w, in, lane, offset, Races::updates, Races::strong);
    if (in.detail[completes]) {
      complete_transactions(w, in, lane, offset, bytes);
    } else {
      Barrier &b = barrier_at(w, in, lane, offset);
      b.transactions += bytes;
      if (b.transactions > most) w.fail(in, lane, "an mbarrier's tx-count is out of range");
      store(w, offset, b);
    }
  });
  return Outcome::next;
}

// arrive and arrive_drop, with their variants.
Outcome arrive_instruction(Warp &w, const Instruction &in, Lanes lanes) {
  for_lanes(lanes, [&](int lane) {
    const size_t offset = offset_of(w, in, lane, in.operands[1]);
    Barrier &b = barrier_at(w, in, lane, offset);
    uint32_t count = 1;
    if (in.detail[expects])
      b.transactions += static_cast<uint32_t>(w.get(in.operands[2], lane));
    else if (in.operands.size() > 2)
      count = static_cast<uint32_t>(w.get(in.operands[2], lane));
    w.set(in.operands[0], lane, token(b));
    if (in.detail[drops]) {
      if (count > b.expected) w.fail(in, lane, "more arrivals are dropped than the mbarrier expects");
      b.expected -= count;
    }
    touch(w, in, lane, offset, Races::updates, Races::strong);
    if (w.block.races && !has(in, "relaxed")) w.block.races->arrive(w, lane, offset);
    const uint64_t phase = b.phase;
    arrive(w, in, lane, offset, count);
    if (in.detail[completes] == -1 && b.phase != phase) w.fail(in, lane, "arrive.noComplete completes the phase");
  });
  return Outcome::next;
}

// The predicate of a wait: is the phase complete?
bool complete(Warp &w, const Instruction &in, int lane) {
  const size_t offset = offset_of(w, in, lane, in.operands[1]);
  Barrier &b = barrier_at(w, in, lane, offset);
  touch(w, in, lane, offset, Races::reads, Races::strong);
  const uint64_t given = w.get(in.operands[2], lane);
  if (in.detail[expects]) {  // .parity
    if (given > 1) w.fail(in, lane, "the parity of a phase is 0 or 1, not " + std::to_string(given));
    const bool over = (b.phase & 1) != given;
    b.observed |= over;
    return over;
  }
  const uint64_t phase = given >> 20;
  if (phase > b.phase || phase + 1 < b.phase) w.fail(in, lane, "the state is not of the mbarrier's current or preceding phase");
  b.observed |= phase != b.phase;
  return phase != b.phase;
}

// For the lanes whose phase is over.
void see(Warp &w, const Instruction &in, Lanes lanes) {
  while (lanes && !has(in, "relaxed")) {
    const size_t offset = offset_of(w, in, __builtin_ctz(lanes), in.operands[1]);
    Lanes same = 0;
    for_lanes(lanes, [&](int lane) {
      if (offset_of(w, in, lane, in.operands[1]) == offset) same |= Lanes{1} << lane;
    });
    w.block.races->see_over(w, same, offset);
    lanes &= ~same;
  }
}

// test_wait too: it does not block, but its thread may be slow, so it may as well be asked again when something has moved.
// Loops around it then end in the grid's deadlock, instead of never.
Outcome wait(Warp &w, const Instruction &in, Lanes lanes) {
  Grid &grid = w.block.grid;
  bool all = true, first = false;
  bool done[32] = {};
  Lanes over = 0;
  for_lanes(lanes, [&](int lane) {
    done[lane] = complete(w, in, lane);
    if (done[lane]) over |= Lanes{1} << lane;
    all &= done[lane];
    first |= !w.ticket[lane];
    w.ticket[lane] = 1;
  });
  // It may give up early, and does so sometimes: who does not ask again is found out.
  const bool hasty = first && grid.deferred.random && next_random(grid.random) % 8 == 0;
  if (!all && !hasty && !grid.impatient) return Outcome::wait;
  if (w.block.races) see(w, in, over);
  for_lanes(lanes, [&](int lane) {
    w.ticket[lane] = 0;
    w.set(in.operands[0], lane, done[lane]);
  });
  return Outcome::next;
}

Outcome pending_count(Warp &w, const Instruction &in, Lanes lanes) {
  for_lanes(lanes, [&](int lane) { w.set(in.operands[0], lane, w.get(in.operands[1], lane) & most); });
  return Outcome::next;
}

}  // namespace

Barrier &barrier_at(Warp &w, const Instruction &in, int lane, size_t offset) {
  auto &barriers = async_state(w.block).barriers;
  const auto found = barriers.find(offset);
  if (found == barriers.end()) w.fail(in, lane, "no mbarrier was initialised at shared offset " + std::to_string(offset));
  const uint64_t word = found->second.word();
  if (std::memcmp(w.block.shared.bytes.data() + offset, &word, 8))
    w.fail(in, lane, "the mbarrier at shared offset " + std::to_string(offset) + " was overwritten");
  return found->second;
}

void arrive(Warp &w, const Instruction &in, int lane, size_t offset, uint32_t count) {
  Barrier &b = async_state(w.block).barriers.at(offset);
  if (count < 1 || count > b.pending)
    w.fail(in, lane,
           std::to_string(count) + " arrivals at an mbarrier that waits for " + std::to_string(b.pending) + " in this phase");
  if (b.phase && !b.observed) w.fail(in, lane, "arrives in a phase before any wait saw the end of the one before");
  b.pending -= count;
  settle(w, in, lane, offset, b);
}

void complete_transactions(Warp &w, const Instruction &in, int lane, size_t offset, int64_t bytes) {
  Barrier &b = barrier_at(w, in, lane, offset);
  b.transactions -= bytes;
  settle(w, in, lane, offset, b);
}

void expect_arrival(Warp &w, const Instruction &in, int lane, size_t offset) {
  Barrier &b = barrier_at(w, in, lane, offset);
  if (++b.pending > most) w.fail(in, lane, "an mbarrier's pending count is out of range");
  store(w, offset, b);
}

bool decode_mbarrier(Instruction &in) {
  const std::string &what = in.words[1];
  if (what == "init") {
    in.execute = init;
  } else if (what == "inval") {
    in.execute = invalidate;
  } else if (what == "expect_tx" || what == "complete_tx") {
    in.execute = transactions;
    in.detail[completes] = what == "complete_tx";
  } else if (what == "arrive" || what == "arrive_drop") {
    in.execute = arrive_instruction;
    in.detail[expects] = has(in, "expect_tx");
    in.detail[drops] = what == "arrive_drop";
    in.detail[completes] = has(in, "noComplete") ? -1 : 0;
  } else if (what == "test_wait" || what == "try_wait") {
    in.execute = wait;
    in.detail[expects] = has(in, "parity");
  } else if (what == "pending_count") {
    in.execute = pending_count;
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx
