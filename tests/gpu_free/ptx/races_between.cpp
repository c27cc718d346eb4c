// Accesses of global memory, each against those of other blocks that nothing has put behind it.
#include "races_between.h"

#include <cstdio>

#include "races.h"

namespace ptx {
namespace {

// Of two blocks: are they no race, whatever their order?
bool harmless(const RacesBetween::Seen &a, const RacesBetween::Seen &b) {
  return (a.bytes & b.bytes) == 0 || (!a.write && !b.write) || (a.element != 0 && a.element == b.element);
}

}  // namespace

RacesBetween::RacesBetween(const Grid &grid) : grid_(grid), orders_(grid.function.orders_blocks) {}

bool RacesBetween::ordered(const Actor &actor, const Seen &before) const {
  const Clock *clock = &actor.known;
  if (before.block != actor.warp.block.number) {
    if (clock->others == nullptr) return false;
    const auto found = clock->others->find(before.block);
    if (found == clock->others->end()) return false;
    clock = found->second.get();
  }
  for (Lanes rest = before.lanes; rest; rest &= rest - 1)
    if (at(*clock, before.who + static_cast<size_t>(__builtin_ctz(rest))) < before.epoch) return false;
  return true;
}

void RacesBetween::see(const Actor &actor, Seen now, uint64_t address, size_t bytes) {
  for (const uint64_t end = address + bytes; address < end;) {
    const uint64_t first = address % 4, count = std::min(4 - first, end - address), word = address / 4;
    now.bytes = static_cast<uint8_t>(((1u << count) - 1) << first);
    Page &page = page_of(word);
    uint32_t &written = page.written[word % Page::words], &read = page.read[word % Page::words];
    if (!orders_) compare(page.cells[word % Page::words], actor, now, word);
    if (written) compare(page, written, actor, now, word);
    if (now.write && read) compare(page, read, actor, now, word);
    remember(page, now.write ? written : read, now);
    address += count;
  }
}

void RacesBetween::see_first(Page &page, const Warp &w, const Instruction &i, int lane, uint64_t word, bool write) {
  const auto instruction = static_cast<uint32_t>(&i - grid_.function.code.data());
  const auto thread = static_cast<uint32_t>(w.thread(lane));
  const Seen now = {w.block.number, 0, thread, 1, static_cast<int>(instruction), write, 0, 15};
  const Clock nothing;
  const Actor actor = {w, i, lane, nothing};
  Cell &cell = page.cells[word % Page::words];
  uint32_t &written = page.written[word % Page::words], &read = page.read[word % Page::words];
  compare(cell, actor, now, word);
  if (written) compare(page, written, actor, now, word);
  if (write && read) compare(page, read, actor, now, word);
  (write ? cell.written : cell.read[cell.read[0].block != 0]) = {now.block + 1, instruction * 1024 + thread};
}

void RacesBetween::compare(const Cell &cell, const Actor &actor, const Seen &now, uint64_t word) const {
  for (const Part *part : {&cell.written, &cell.read[0], &cell.read[1]}) {
    if (part->block == 0 || part->block == now.block + 1) continue;
    const Seen before = {part->block - 1, 0, part->by % 1024, 1, static_cast<int>(part->by / 1024), part == &cell.written, 0, 15};
    if (!harmless(before, now)) fail(actor, now, before, word);
  }
}

void RacesBetween::compare(Page &page, uint32_t &list, const Actor &actor, const Seen &now, uint64_t word) {
  for (uint32_t *link = &list; *link;) {
    Seen &before = page.seen[*link];
    const bool conflict = before.block != now.block && !harmless(before, now);
    const bool comes_after = orders_ && (conflict || now.write) && ordered(actor, before);
    if (conflict && !comes_after) fail(actor, now, before, word);
    // Whoever comes after this write comes after that, and whoever does not has a race with this one.
    if (comes_after && now.write && (!now.element || before.element)) before.bytes &= static_cast<uint8_t>(~now.bytes);
    if (before.bytes) {
      link = &before.next;
    } else {
      const uint32_t gone = *link;
      *link = before.next;
      before.next = page.spare;
      page.spare = gone;
    }
  }
}

void RacesBetween::remember(Page &page, uint32_t &list, const Seen &now) {
  int alike = 0, looked = 0;
  for (uint32_t *link = &list; *link; link = &page.seen[*link].next) {
    if (orders_ && ++looked == 8) break;  // it may be there twice
    const uint32_t at = *link;
    Seen &before = page.seen[at];
    if (before.element != now.element || (before.bytes & now.bytes) != now.bytes) continue;
    if (!orders_) {
      // Nothing will ever be ordered behind it: whoever would have a race with this has one with that, or is one of the two.
      if (before.block == now.block || ++alike == 2) return;
      continue;
    }
    if (before.block != now.block || before.who != now.who || before.bytes != now.bytes) continue;
    // The lane has done so again, or another of its warp.
    const bool same = before.epoch == now.epoch && before.instruction == now.instruction;
    if (!same && before.lanes != now.lanes) {
      before.lanes &= ~now.lanes;
      continue;
    }
    const Lanes lanes = same ? before.lanes | now.lanes : now.lanes;
    *link = before.next;
    const uint32_t next = list;
    before = now;
    before.lanes = lanes;
    before.next = next;
    list = at;
    return;
  }
  uint32_t at = page.spare;
  if (at) {
    page.spare = page.seen[at].next;
  } else {
    at = static_cast<uint32_t>(page.seen.size());
    page.seen.emplace_back();
  }
  page.seen[at] = now;
  page.seen[at].next = list;
  list = at;
}

void RacesBetween::fail(const Actor &actor, const Seen &now, const Seen &before, uint64_t word) const {
  const uint64_t address = word * 4 + static_cast<uint64_t>(__builtin_ctz(now.bytes & before.bytes));
  Lanes lanes = before.lanes;
  // Of the lanes, the first that is not ordered.
  for (Seen one = before; orders_ && lanes; lanes &= lanes - 1) {
    one.lanes = lanes & -lanes;
    if (!ordered(actor, one)) break;
  }
  char place[20];
  std::snprintf(place, sizeof place, "0x%llx", static_cast<unsigned long long>(address));
  const uint32_t threads = 32 * static_cast<uint32_t>(actor.warp.block.warps.size());
  const std::string who = before.who < threads
                              ? "thread " + thread_name(grid_, before.who + static_cast<uint32_t>(__builtin_ctz(lanes)))
                              : "asynchronous copies";
  actor.warp.fail(actor.instruction, actor.lane,
                  std::string("a race: this ") + (now.write ? "write" : "read") + " of global memory at " + place + " and a " +
                      (before.write ? "write" : "read") + " by " +
                      named(grid_.function.code[static_cast<size_t>(before.instruction)]) + ", block " +
                      block_name(grid_, before.block) + ", " + who + ": nothing orders them");
}

}  // namespace ptx
