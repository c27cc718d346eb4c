// What orders the threads of a block, and asynchronous work with them; and those of other blocks.
#include "races.h"

namespace ptx {

void Races::publish(Clock &clock, const Warp &w, Lanes lanes) {
  OfWarp &warp = of(w);
  const Clock *merged = nullptr;
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const Lane &me = warp.lanes[lane];
    if (me.known.get() != merged) merge(clock, *me.known);
    merged = me.known.get();
    raise(clock, static_cast<size_t>(w.thread(lane)), warp.epoch);
    for (const Groups &groups : me.work)
      if (groups.agent >= 0) raise(clock, static_cast<size_t>(groups.agent), groups.done);
  }
  ++warp.epoch;
}

// f(known) once for all lanes that know the same; nobody else has it then, but for those outside of `lanes`.
template <class F>
void Races::for_known(const Warp &w, Lanes lanes, F f) {
  OfWarp &warp = of(w);
  while (lanes) {
    Known known = std::move(warp.lanes[__builtin_ctz(lanes)].known);
    Lanes same = lanes & -lanes;
    for (Lanes rest = lanes & (lanes - 1); rest; rest &= rest - 1) {
      Known &other = warp.lanes[__builtin_ctz(rest)].known;
      if (other != known) continue;
      other.reset();
      same |= rest & -rest;
    }
    lanes &= ~same;
    f(known);
    for (; same; same &= same - 1) warp.lanes[__builtin_ctz(same)].known = known;
  }
}

void Races::meet(const Warp &w, Lanes members) {
  Known joined;
  publish(own(joined), w, members);
  for (; members; members &= members - 1) lane_of(w, __builtin_ctz(members)).known = joined;
}

void Races::fence(const Warp &w, Lanes lanes, bool far) {
  for (; lanes; lanes &= lanes - 1) {
    Lane &me = lane_of(w, __builtin_ctz(lanes));
    learn(me.known, me.pending);
    me.pending.reset();
    me.fenced.reset();
    if (far && between_) {
      learn_far(me.known, me.far_pending);
      me.far_pending.reset();
      me.far_fenced = published(w, __builtin_ctz(lanes));
    }
    publish(own(me.fenced), w, lanes & -lanes);
  }
}

Known Races::published(const Warp &w, int lane) {
  Known mine;
  publish(own(mine), w, Lanes{1} << lane);
  auto all = mine->others ? std::make_shared<Others>(*mine->others) : std::make_shared<Others>();
  mine->others.reset();
  (*all)[block_.number] = mine;
  Known far = std::make_shared<Clock>();
  far->others = std::move(all);
  return far;
}

void Races::learn_far(Known &known, const Known &far) const {
  if (far == nullptr) return;
  learn(known, far);
  // Among it, what the block itself had published.
  const auto mine = far->others->find(block_.number);
  if (mine != far->others->end() && !covers(*known, *mine->second)) merge(own(known), *mine->second);
}

// Has it just read so, with nothing released there since?
bool Races::spins(const Warp &w, const Instruction &i, int lane, const void *place, const RacesBetween::Place &there) {
  auto &last = lane_of(w, lane).spin;
  const uint32_t epoch = of(w).epoch;
  if (last.place == place && last.instruction == &i && last.epoch == epoch && last.released == there.released) return true;
  last = {place, &i, epoch, there.released};
  return false;
}

void Races::order_far(const Warp &w, int lane, RacesBetween::Place &place, Kind kind, int order) {
  Lane &me = lane_of(w, lane);
  if (kind & reads) {
    if (order & acquires)
      learn_far(me.known, place.released);
    else
      learn(me.far_pending, place.released);
  }
  if (!(kind & writes)) return;
  const auto thread = static_cast<uint32_t>(w.thread(lane));
  // A store of somebody else's ends the chain, an atomic goes on with it.
  if (!(kind & reads) && (place.block != block_.number || place.thread != thread)) place.released.reset();
  place.block = block_.number;
  place.thread = thread;
  learn(place.released, order & releases ? published(w, lane) : me.far_fenced);
}

void Races::come(const Warp &w, Lanes lanes, size_t barrier) { publish(own(barriers_[barrier]), w, lanes); }

void Races::go_on(const Warp &w, Lanes lanes, size_t barrier) {
  for_known(w, lanes, [&](Known &known) { learn(known, barriers_[barrier]); });
}

void Races::done(size_t barrier) { barriers_[barrier].reset(); }

void Races::init(size_t barrier) { mbarriers_[barrier] = {static_cast<int>(new_agent({copies, true, barrier})), {}, {}}; }

void Races::arrive(const Warp &w, int lane, size_t barrier) { publish(own(mbarriers_.at(barrier).current), w, Lanes{1} << lane); }

Known Races::arrival_of_copies(const Warp &w, int lane) {
  Known known;
  publish(own(known), w, Lanes{1} << lane);
  Groups &groups = lane_of(w, lane).work[copies];
  if (groups.agent >= 0) raise(*known, static_cast<size_t>(groups.agent), groups.group++);
  return known;
}

void Races::arrive(const Known &known, size_t barrier) { learn(mbarriers_.at(barrier).current, known); }

void Races::phase(size_t barrier, uint64_t over) {
  Mbarrier &b = mbarriers_.at(barrier);
  raise(own(b.current), static_cast<size_t>(b.agent), static_cast<uint32_t>(over));
  b.over = b.current;
}

void Races::see_over(const Warp &w, Lanes lanes, size_t barrier) {
  for_known(w, lanes, [&](Known &known) { learn(known, mbarriers_.at(barrier).over); });
}

void Races::commit(const Warp &w, Lanes lanes, Work work) {
  if (work == products) return of(w).products.commit();
  for (; lanes; lanes &= lanes - 1) lane_of(w, __builtin_ctz(lanes)).work[work].commit();
}

void Races::wait(const Warp &w, Lanes lanes, Work work, int64_t but) {
  if (work != products) {
    for (; lanes; lanes &= lanes - 1) lane_of(w, __builtin_ctz(lanes)).work[work].wait(but);
    return;
  }
  Groups &groups = of(w).products;
  groups.wait(but);
  if (groups.agent < 0) return;
  for_known(w, lanes, [&](Known &known) { raise(own(known), static_cast<size_t>(groups.agent), groups.done); });
}

}  // namespace ptx
