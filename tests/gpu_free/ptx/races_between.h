// Races for global memory between the blocks of a grid: two accesses of a byte, one of them a write, and nothing that orders
// them. Blocks run one after the other here, or a few at a time; on a GPU any two may run at once, so that which came first
// says nothing.
//
// Between blocks, the PTX manual has only this: what a release publishes and an acquire takes, each of them an instruction or
// a fence beside a strong access of one place, the write that is read or a chain of atomics that began with it, and all of it
// of a scope (.gpu, .sys; volatile is .sys) in which the other block is. Barriers carry it on to the other threads of a block.
// Two strong accesses of such a scope are no race if they are of the same bytes. Two writes of the same value are one:
// which values the data of a test have says nothing about others.
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

  // A place of strong accesses: what those who wrote there had released, to other blocks.
  struct Place {
    Known released;
    uint32_t block = 0, thread = 0;  // who was the last to write
  };
  // Null where nothing in the kernel could order blocks.
  Place *place(const void *at) { return orders_ ? &places_[at] : nullptr; }

 private:
  // 4 KB of memory. Lists are chains in `seen`, of which 0 is the end.
  struct Page {
    static constexpr size_t words = 1024;
    uint32_t written[words] = {}, read[words] = {};  // by word: the first of those seen
    std::vector<Seen> seen{1};
    uint32_t spare = 0;
  };

  Page &page_of(uint64_t word);
  bool ordered(const Actor &, const Seen &before) const;
  void compare(Page &, uint32_t &list, const Actor &, const Seen &now, uint64_t word);
  void remember(Page &, uint32_t &list, const Seen &now);
  [[noreturn]] void fail(const Actor &, const Seen &now, const Seen &before, uint64_t word) const;

  const Grid &grid_;
  const bool orders_;
  std::unordered_map<uint64_t, Page> pages_;
  struct {
    uint64_t number = ~uint64_t{0};
    Page *page = nullptr;
  } recent_[64];
  std::unordered_map<const void *, Place> places_;
};

}  // namespace ptx

#endif
