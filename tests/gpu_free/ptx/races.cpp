// Accesses of shared memory, each against those before it that nothing has put behind it yet.
#include "races.h"

namespace ptx {
namespace {

const Instruction *code_of(const Warp &w) { return w.block.grid.function.code.data(); }

}  // namespace

std::string named(const Instruction &i) {
  return "line " + std::to_string(i.line) + " \"" + (i.text.size() < 80 ? i.text : i.text.substr(0, 76) + " ...") + "\"";
}

Races::Races(Block &block)
    : block_(block),
      between_(uint64_t{block.grid.size[0]} * block.grid.size[1] * block.grid.size[2] > 1 ? block.grid.races.get() : nullptr),
      warps_(block.warps.size()),
      words_((block.shared.bytes.size() + 3) / 4) {
  const Known nothing = std::make_shared<Clock>();
  for (OfWarp &warp : warps_)
    for (Lane &lane : warp.lanes) lane.known = nothing;
}

uint32_t Races::new_agent(const Agent &agent) {
  agents_.push_back(agent);
  return static_cast<uint32_t>(32 * warps_.size() + agents_.size() - 1);
}

uint32_t Races::agent_of(Groups &groups, const Agent &agent) {
  if (groups.agent < 0) groups.agent = static_cast<int>(new_agent(agent));
  return static_cast<uint32_t>(groups.agent);
}

// Does a lane come after an epoch of thread or agent `number`?
bool Races::after(const OfWarp &warp, size_t index, int lane, size_t number, uint32_t epoch) const {
  const Lane &me = warp.lanes[lane];
  if (number == index * 32 + static_cast<size_t>(lane) || at(*me.known, number) >= epoch) return true;
  for (const Groups &groups : me.work)
    if (groups.agent == static_cast<int>(number)) return groups.done >= epoch;
  return false;
}

bool Races::ordered(const Actor &actor, const Seen &before) const {
  const auto index = static_cast<size_t>(actor.warp.index);
  const OfWarp &warp = warps_[index];
  for (Lanes rest = before.lanes; rest; rest &= rest - 1) {
    const size_t number = before.who + static_cast<size_t>(__builtin_ctz(rest));
    if (actor.lane >= 0) {
      if (!after(warp, index, actor.lane, number, before.epoch)) return false;
    } else if (number / 32 != index) {
      // The warp does it as one: what any of its lanes comes after.
      int lane = 0;
      while (lane < 32 && !after(warp, index, lane, number, before.epoch)) ++lane;
      if (lane == 32) return false;
    }
  }
  return true;
}

void Races::see(const Actor &actor, Seen now, size_t offset, size_t bytes, const void *value) {
  const auto *given = static_cast<const unsigned char *>(value);
  for (size_t end = offset + bytes; offset < end;) {
    const size_t first = offset % 4, count = std::min(4 - first, end - offset);
    now.bytes = static_cast<uint8_t>(((1u << count) - 1) << first);
    see_word(actor, now, offset / 4, given);
    offset += count;
    if (given) given += count;
  }
}

void Races::see_word(const Actor &actor, const Seen &now, size_t word, const void *value) {
  std::vector<Seen> &all = words_[word];
  bool merged = false;
  for (size_t k = 0; k < all.size();) {
    Seen &before = all[k];
    if (!(before.bytes & now.bytes)) {
      ++k;
      continue;
    }
    const bool conflict = (before.write || now.write) && !(before.strong && now.strong);
    const bool comes_after = (conflict || now.write) && ordered(actor, before);
    if (conflict && !comes_after) {
      const auto at = word * 4 + static_cast<size_t>(__builtin_ctz(now.bytes));
      const auto count = static_cast<size_t>(__builtin_popcount(now.bytes));
      const bool same = before.write && now.write && value && std::memcmp(block_.shared.bytes.data() + at, value, count) == 0;
      if (!same) fail(actor, now, before, word);
    }
    const bool alike = before.who == now.who && before.write == now.write && before.strong == now.strong;
    if (alike && before.epoch == now.epoch && before.instruction == now.instruction && before.bytes == now.bytes) {
      before.lanes |= now.lanes;
      merged = true;
    } else if (comes_after && now.write && (!now.strong || before.strong)) {
      // Whoever comes after this write comes after that, and whoever does not has a race with this one.
      before.bytes &= static_cast<uint8_t>(~now.bytes);
    } else if (alike && !now.write && !(before.bytes & ~now.bytes)) {
      before.lanes &= ~now.lanes;  // the lane has read it again
    }
    if (before.bytes && before.lanes) {
      ++k;
    } else {
      before = all.back();
      all.pop_back();
    }
  }
  if (!merged) all.push_back(now);
}

void Races::fail(const Actor &actor, const Seen &now, const Seen &before, size_t word) const {
  const size_t threads = 32 * warps_.size(), lowest = static_cast<size_t>(__builtin_ctz(now.bytes & before.bytes));
  const Instruction &other = block_.grid.function.code[static_cast<size_t>(before.instruction)];
  Lanes lanes = before.lanes;
  // Of the lanes, the first that is not ordered.
  for (Seen one = before; lanes; lanes &= lanes - 1) {
    one.lanes = lanes & -lanes;
    if (!ordered(actor, one)) break;
  }
  std::string who;
  if (before.who < threads) {
    who = "thread " + thread_name(block_.grid, before.who + static_cast<uint32_t>(__builtin_ctz(lanes)));
  } else {
    const Agent &agent = agents_[before.who - threads];
    if (agent.bulk)
      who = "bulk copies on the mbarrier at shared offset " + std::to_string(agent.of);
    else if (agent.work == products)
      who = "matrix products of warp " + std::to_string(agent.of);
    else
      who = "copies of thread " + thread_name(block_.grid, static_cast<uint32_t>(agent.of));
  }
  actor.warp.fail(actor.instruction, actor.lane,
                  std::string("a race: this ") + (now.write ? "write" : "read") + " of shared offset " +
                      std::to_string(word * 4 + lowest) + " and a " + (before.write ? "write" : "read") + " by " + named(other) +
                      ", " + who + ": nothing orders them");
}

void Races::access(const Warp &w, const Instruction &i, int lane, const void *place, size_t bytes, Kind kind, int order,
                   const void *value, size_t count) {
  const std::vector<unsigned char> &all = block_.shared.bytes;
  const auto *p = static_cast<const unsigned char *>(place);
  const auto who = static_cast<uint32_t>(w.index * 32);
  const bool write = (kind & writes) != 0, shared = p >= all.data() && p < all.data() + all.size();
  const bool between = !shared && between_ && !private_to_thread(place);
  RacesBetween::Place *const for_all = between && order & far ? between_->place(place) : nullptr;
  const bool again = for_all && !write && spins(w, i, lane, place, *for_all);
  if (shared) {
    const auto instruction = static_cast<int>(&i - code_of(w));
    const Seen now = {of(w).epoch, who, Lanes{1} << lane, instruction, 0, write, order != weak};
    see({w, i, lane}, now, static_cast<size_t>(p - all.data()), bytes, value);
  } else if (between && !again) {
    const auto address = reinterpret_cast<uint64_t>(place);
    if (order == weak && between_->is_plain(address, bytes)) return between_->see_plain(w, i, lane, address, bytes, write);
    see_between({w, i, lane}, who, of(w).epoch, Lanes{1} << lane, address, bytes, write, order & far ? bytes / count : 0);
  }
  if (order == weak) return;
  Lane &me = lane_of(w, lane);
  Known &there = places_[place];
  if (kind & reads) learn(order & acquires ? me.known : me.pending, there);
  if (write && order & releases)
    publish(own(there), w, Lanes{1} << lane);
  else if (write)
    learn(there, me.fenced);
  if (for_all && !again) order_far(w, lane, *for_all, kind, order);
}

void Races::copy(const Warp &w, const Instruction &i, int lane, size_t offset, size_t bytes, uint64_t from, size_t taken) {
  Groups &groups = lane_of(w, lane).work[copies];
  const uint32_t agent = agent_of(groups, {copies, false, static_cast<size_t>(w.thread(lane))});
  see({w, i, lane}, {groups.group, agent, 1, static_cast<int>(&i - code_of(w)), 0, true, false}, offset, bytes, nullptr);
  if (between_) see_between({w, i, lane}, agent, groups.group, 1, from, taken, false);
}

void Races::bulk_store(const Warp &w, const Instruction &i, int lane, size_t offset, size_t bytes, uint64_t to) {
  Groups &groups = lane_of(w, lane).work[stores];
  const uint32_t agent = agent_of(groups, {stores, false, static_cast<size_t>(w.thread(lane))});
  see({w, i, lane}, {groups.group, agent, 1, static_cast<int>(&i - code_of(w)), 0, false, false}, offset, bytes, nullptr);
  if (!between_) return;
  Groups &writing = lane_of(w, lane).work[written];
  const uint32_t writer = agent_of(writing, {written, false, static_cast<size_t>(w.thread(lane))});
  see_between({w, i, lane}, writer, writing.group, 1, to, bytes, true);
}

void Races::product(const Warp &w, const Instruction &i, size_t offset, size_t bytes) {
  Groups &groups = of(w).products;
  const uint32_t agent = agent_of(groups, {products, false, static_cast<size_t>(w.index)});
  see({w, i, -1}, {groups.group, agent, 1, static_cast<int>(&i - code_of(w)), 0, false, false}, offset, bytes, nullptr);
}

void Races::bulk_copy(const Warp &w, const Instruction &i, int lane, size_t offset, size_t bytes, Kind kind, size_t barrier,
                      uint64_t phase) {
  const auto agent = static_cast<uint32_t>(mbarriers_.at(barrier).agent);
  const Seen now = {
      static_cast<uint32_t>(phase + 1), agent, 1, static_cast<int>(&i - code_of(w)), 0, (kind & writes) != 0, false};
  see({w, i, lane}, now, offset, bytes, nullptr);
}

void Races::bulk_load(const Warp &w, const Instruction &i, int lane, uint64_t from, size_t bytes, size_t barrier,
                      uint64_t phase) {
  const auto agent = static_cast<uint32_t>(mbarriers_.at(barrier).agent);
  if (between_) see_between({w, i, lane}, agent, static_cast<uint32_t>(phase + 1), 1, from, bytes, false);
}

void Races::see_between(const Actor &actor, uint32_t who, uint32_t epoch, Lanes lanes, uint64_t address, size_t bytes, bool write,
                        size_t element) {
  const auto instruction = static_cast<int>(&actor.instruction - code_of(actor.warp));
  const Clock &known = *lane_of(actor.warp, actor.lane).known;
  between_->see({actor.warp, actor.instruction, actor.lane, known},
                {block_.number, epoch, who, lanes, instruction, write, static_cast<uint8_t>(element)}, address, bytes);
}

// Local memory and parameters lie in the host's memory too, where other blocks' may come to lie later.
bool Races::private_to_thread(const void *place) const {
  const auto *p = static_cast<const unsigned char *>(place);
  const std::vector<unsigned char> &local = block_.local, &parameters = block_.grid.parameters;
  return (p >= parameters.data() && p < parameters.data() + parameters.size()) ||
         (p >= local.data() && p < local.data() + local.size());
}

}  // namespace ptx
