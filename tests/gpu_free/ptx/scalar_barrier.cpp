// The sixteen barriers of a block: bar and barrier.
//
// Barriers count warps, each as 32 threads, when all threads of it that have not exited have arrived. A thread that waits
// has a ticket: 1, and from the completion of its barrier on 2 + the result of the reduction.
#include "races.h"
#include "scalar.h"

namespace ptx {

namespace {

enum Kind { sync, arrive, popc, all_of, any_of };

struct Barrier {
  Lanes arrived[32] = {}, waiting[32] = {};
  uint32_t expected = 0;   // threads
  bool everybody = false;  // some did not say how many: all that have not exited
  bool used = false;
  bool reduces = false;
  uint32_t yes = 0, no = 0;  // predicates of a reduction
};

}  // namespace

struct BarrierState {
  Barrier barriers[16];
};

namespace {

// detail: [0] Kind, [1] .aligned, [2] operand of the barrier, [3] of the count, -1 if none, [4] of the predicate.
struct Form {
  const Warp &w;
  const Instruction &i;
  Kind kind = static_cast<Kind>(i.detail[0]);

  uint32_t barrier(int lane) const {
    const auto id = static_cast<uint32_t>(w.get(i.operands[static_cast<size_t>(i.detail[2])], lane));
    if (id >= 16) w.fail(i, lane, "there are 16 barriers, none is " + std::to_string(id));
    return id;
  }
  // 0 if it does not say.
  uint32_t count(int lane) const {
    if (i.detail[3] < 0) return 0;
    const auto count = static_cast<uint32_t>(w.get(i.operands[static_cast<size_t>(i.detail[3])], lane));
    if (count == 0 || count % 32) w.fail(i, lane, "a barrier of " + std::to_string(count) + " threads, no multiple of 32");
    return count;
  }
  bool predicate(int lane) const {
    const Operand &o = i.operands[static_cast<size_t>(i.detail[4])];
    return ((w.get(o, lane) & 1) != 0) != o.negated;
  }
};

void come(const Form &form, Warp &w, Barrier &barrier, int lane) {
  const Instruction &i = form.i;
  const size_t warp = static_cast<size_t>(w.index);
  const Lanes bit = Lanes{1} << lane;
  const uint32_t count = form.count(lane), all = static_cast<uint32_t>(w.block.warps.size()) * 32;
  const bool reduces = form.kind >= popc;
  if (!barrier.used) barrier.expected = count ? count : all, barrier.reduces = reduces, barrier.used = true;
  if (barrier.arrived[warp] & bit) w.fail(i, lane, "arrives a second time at a barrier that has not completed");
  if (barrier.expected != (count ? count : all))
    w.fail(i, lane,
           "a barrier of " + std::to_string(count ? count : all) + " threads, but others wait for " +
               std::to_string(barrier.expected));
  if (barrier.reduces != reduces) w.fail(i, lane, "a reduction at a barrier where others do none");
  barrier.everybody |= count == 0;
  barrier.arrived[warp] |= bit;
  if (reduces) (form.predicate(lane) ? barrier.yes : barrier.no)++;
  if (form.kind == arrive) return;
  barrier.waiting[warp] |= bit;
  w.ticket[lane] = 1;
}

bool complete(const Form &form, const Block &block, const Barrier &barrier) {
  if (!barrier.used) return false;
  uint32_t threads = 0;
  bool everybody = true;
  for (size_t k = 0; k < block.warps.size(); k++) {
    const Lanes live = block.warps[k]->live, missing = live & ~barrier.arrived[k];
    if (barrier.arrived[k] && !missing) threads += 32;
    everybody = everybody && !missing;
  }
  if (barrier.everybody) return everybody;
  if (threads > barrier.expected)
    form.w.fail(form.i, -1, std::to_string(threads) + " threads at a barrier of " + std::to_string(barrier.expected));
  return threads == barrier.expected;
}

void release(Kind kind, Block &block, Barrier &barrier, uint32_t id) {
  const uint32_t result = kind == popc ? barrier.yes : kind == all_of ? barrier.no == 0 : kind == any_of ? barrier.yes != 0 : 0;
  for (size_t k = 0; k < block.warps.size(); k++) {
    for (Lanes rest = barrier.waiting[k]; rest; rest &= rest - 1) block.warps[k]->ticket[__builtin_ctz(rest)] = 2 + result;
    if (block.races) block.races->go_on(*block.warps[k], barrier.waiting[k], id);
  }
  barrier = Barrier();
  if (block.races) block.races->done(id);
}

Outcome execute(Warp &w, const Instruction &i, Lanes lanes) {
  const Form form{w, i};
  if (!w.block.barriers) w.block.barriers = std::make_shared<BarrierState>();
  Barrier *barriers = w.block.barriers->barriers;
  Lanes fresh = 0;
  each(lanes, [&](int lane) { fresh |= Lanes{w.ticket[lane] == 0} << lane; });
  // Aligned: the warp comes as one. Whoever is missing will be led here, or never comes and the block hangs.
  if (i.detail[1] && fresh && fresh != w.live) return Outcome::wait;
  each(fresh, [&](int lane) { come(form, w, barriers[form.barrier(lane)], lane); });
  for (Lanes rest = w.block.races ? fresh : 0; rest;) {
    const uint32_t id = form.barrier(__builtin_ctz(rest));
    Lanes same = 0;
    each(rest, [&](int lane) { same |= Lanes{form.barrier(lane) == id} << lane; });
    w.block.races->come(w, same, id);
    rest &= ~same;
  }
  Lanes done = form.kind == arrive ? lanes : 0;
  uint32_t looked = 0;
  for (Lanes rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (form.kind != arrive && w.ticket[lane] >= 2) continue;
    const uint32_t id = form.barrier(lane);
    if (looked >> id & 1) continue;
    looked |= 1u << id;
    if (complete(form, w.block, barriers[id])) release(form.kind, w.block, barriers[id], id);
  }
  if (form.kind == arrive) return Outcome::next;
  each(lanes, [&](int lane) {
    if (w.ticket[lane] < 2) return;
    if (form.kind != sync) w.set(i.operands[0], lane, w.ticket[lane] - 2);
    w.ticket[lane] = 0;
    done |= Lanes{1} << lane;
  });
  if (done == lanes) return Outcome::next;
  if (!done) return Outcome::wait;
  each(done, [&](int lane) { w.pc[lane]++; });
  return Outcome::jumped;
}

}  // namespace

Decoded decode_barrier(Instruction &i, const std::string &op, Words &words) {
  if (op != "bar" && op != "barrier") return {};
  words.take("cta");
  i.detail[1] = words.take("aligned") || op == "bar";
  const int what = words.one_of({"sync", "arrive", "red"});
  const size_t operands = i.operands.size();
  if (what < 0) return {};
  if (what < 2) {
    i.detail[0] = what;
    i.detail[2] = 0;
    i.detail[3] = operands > 1 ? 1 : -1;
    return what == 1 && operands != 2 ? Decoded{} : Decoded{execute, operands > 1 ? size_t{2} : size_t{1}};
  }
  const int reduction = words.one_of({"popc", "and", "or"});
  words.take(reduction == 0 ? "u32" : "pred");
  if (reduction < 0) return {};
  i.detail[0] = popc + reduction;
  i.detail[2] = 1;
  i.detail[3] = operands > 3 ? 2 : -1;
  i.detail[4] = operands > 3 ? 3 : 2;
  return {execute, operands > 3 ? size_t{4} : size_t{3}};
}

}  // namespace ptx
