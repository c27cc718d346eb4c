// Races for global memory between the blocks of a grid: two accesses of a byte, one of them a write, and nothing that orders
// them. Blocks run one after the other here, or a few at a time; on a GPU any two may run at once, so that which came first
// says nothing.
//
// Between blocks, the PTX manual has only this: what a release publishes and an acquire takes, each of them an instruction or
// a fence beside a strong access of one place, the write that is read or a chain of atomics that began with it, and all of it
// of a scope (.gpu, .sys; volatile is .sys) in which the other block is. Barriers carry it on to the other threads of a block.
// Two strong accesses of such a scope are no race if they are of the same bytes. Two writes of the same value are one:
// which values the data of a test have says nothing about others.
//
// Of a word, a kernel in which nothing can order blocks needs no more than one block that wrote it and two that read it: who
// would have a race with another one has one with these. That, for whole words, is a Cell; all else is in lists.
#ifndef PTX_RACES_BETWEEN_H
#define PTX_RACES_BETWEEN_H

#include <unordered_map>

#include "clocks.h"

namespace ptx {

class RacesBetween {
 public:
  explicit RacesBetween(const Grid &);

  // One or more accesses of the same kind to a word: by lanes of a warp (`who` is the number of its lane 0), or by an agent.
  struct Seen {
    uint32_t block, epoch, who;
    Lanes lanes;
    int instruction;
    bool write;
    uint8_t element;    // bytes of what is accessed as one, if strong and other blocks are in its scope; 0 otherwise
    uint8_t bytes = 0;  // which of the word's four
    uint32_t next = 0;  // in its list
  };
  struct Actor {
    const Warp &warp;
    const Instruction &instruction;
    int lane;
    const Clock &known;  // what it comes after
  };
  void see(const Actor &, Seen now, uint64_t address, size_t bytes);

  // A weak access of whole words by a lane, in a kernel in which nothing can order blocks.
  bool is_plain(uint64_t address, size_t bytes) const { return !orders_ && (address | bytes) % 4 == 0; }
  void see_plain(const Warp &w, const Instruction &i, int lane, uint64_t address, size_t bytes, bool write) {
    const uint32_t me = w.block.number + 1;
    for (uint64_t word = address / 4; word < (address + bytes) / 4; ++word) {
      Page &page = page_of(word);
      const Cell &cell = page.cells[word % Page::words];
      if (cell.written.block == me) continue;
      if (!write && (cell.read[0].block == me || cell.read[1].block)) continue;
      see_first(page, w, i, lane, word, write);
    }
  }

  // A place of strong accesses: what those who wrote there had released, to other blocks.
  struct Place {
    Known released;
    uint32_t block = 0, thread = 0;  // who was the last to write
  };
  // Null where nothing in the kernel could order blocks.
  Place *place(const void *at) { return orders_ ? &places_[at] : nullptr; }

 private:
  struct Part {
    uint32_t block = 0, by = 0;  // the block's number + 1; instruction * 1024 + thread
  };
  struct Cell {
    Part written, read[2];
  };
  // 1 KB of memory. Lists are chains in `seen`, of which 0 is the end.
  struct Page {
    static constexpr size_t words = 256;
    Cell cells[words];
    uint32_t written[words] = {}, read[words] = {};  // by word: the first of those seen
    std::vector<Seen> seen{1};
    uint32_t spare = 0;
  };

  Page &page_of(uint64_t word) {
    const uint64_t number = word / Page::words;
    auto &recent = recent_[number % recents];
    if (recent.number != number) recent = {number, &pages_[number]};
    return *recent.page;
  }
  void see_first(Page &, const Warp &, const Instruction &, int lane, uint64_t word, bool write);
  void compare(const Cell &, const Actor &, const Seen &now, uint64_t word) const;
  bool ordered(const Actor &, const Seen &before) const;
  void compare(Page &, uint32_t &list, const Actor &, const Seen &now, uint64_t word);
  void remember(Page &, uint32_t &list, const Seen &now);
  [[noreturn]] void fail(const Actor &, const Seen &now, const Seen &before, uint64_t word) const;

  const Grid &grid_;
  const bool orders_;
  std::unordered_map<uint64_t, Page> pages_;
  static constexpr size_t recents = 256;
  struct {
    uint64_t number = ~uint64_t{0};
    Page *page = nullptr;
  } recent_[recents];
  std::unordered_map<const void *, Place> places_;
};

}  // namespace ptx

#endif
