// Who knows of what, as vector clocks: what races.cpp and races_between.cpp order accesses by.
//
// Threads of a block have numbers from 0 on, and so have agents behind them, which do asynchronous work: the copies of a
// thread, the matrix products of a warp, the bulk copies that complete on an mbarrier. Each counts its epochs. A clock has,
// by number, the last epoch that whoever has it comes after; what is not in it is 0. Of other blocks, it has such a clock of
// each that it comes after something of.
#ifndef PTX_CLOCKS_H
#define PTX_CLOCKS_H

#include <algorithm>

#include "machine.h"

namespace ptx {

struct Clock;
using Known = std::shared_ptr<Clock>;      // shared by those who know the same: copied by whoever learns more
using Others = std::map<uint32_t, Known>;  // by block

struct Clock {
  std::vector<uint32_t> epochs;
  std::shared_ptr<const Others> others;  // null: nothing
};

inline uint32_t at(const Clock &clock, size_t number) { return number < clock.epochs.size() ? clock.epochs[number] : 0; }

inline void raise(Clock &clock, size_t number, uint32_t epoch) {
  if (number >= clock.epochs.size()) clock.epochs.resize(number + 1);
  clock.epochs[number] = std::max(clock.epochs[number], epoch);
}

inline bool covers(const Clock &clock, const Clock &other) {
  for (size_t k = 0; k < other.epochs.size(); ++k)
    if (at(clock, k) < other.epochs[k]) return false;
  if (other.others == nullptr || other.others == clock.others) return true;
  if (clock.others == nullptr) return false;
  for (const auto &[block, known] : *other.others) {
    const auto found = clock.others->find(block);
    if (found == clock.others->end()) return false;
    if (found->second != known && !covers(*found->second, *known)) return false;
  }
  return true;
}

// To write: all who have it are `holders`, or it is copied.
inline Clock &own(Known &known, long holders = 1) {
  if (known == nullptr)
    known = std::make_shared<Clock>();
  else if (known.use_count() > holders)
    known = std::make_shared<Clock>(*known);
  return *known;
}

inline void merge(Clock &clock, const Clock &other);

// Adds what `other` has.
inline void learn(Known &known, const Known &other) {
  if (other == nullptr || other == known) return;
  if (known == nullptr || covers(*other, *known))
    known = other;
  else if (!covers(*known, *other))
    merge(own(known), *other);
}

inline void merge(Clock &clock, const Clock &other) {
  if (clock.epochs.size() < other.epochs.size()) clock.epochs.resize(other.epochs.size());
  for (size_t k = 0; k < other.epochs.size(); ++k) clock.epochs[k] = std::max(clock.epochs[k], other.epochs[k]);
  if (other.others == nullptr || other.others == clock.others) return;
  if (clock.others == nullptr) {
    clock.others = other.others;
    return;
  }
  auto both = std::make_shared<Others>(*clock.others);
  for (const auto &[block, known] : *other.others) learn((*both)[block], known);
  clock.others = std::move(both);
}

// Asynchronous work of one thread or warp, in groups that it commits and waits for.
struct Groups {
  int agent = -1;      // its number, from the first such work on
  uint32_t group = 1;  // epoch of what is issued now
  uint32_t done = 0;   // those up to here are over, as its thread knows
  std::deque<uint32_t> committed;

  void commit() {
    committed.push_back(group++);
    if (committed.size() > 64) committed.pop_front();
  }
  // All but the latest `but` are over; -1: all, committed or not.
  void wait(int64_t but) {
    if (but < 0) done = group++;
    if (but >= 0 && static_cast<size_t>(but) < committed.size())
      done = std::max(done, committed[committed.size() - 1 - static_cast<size_t>(but)]);
  }
};

}  // namespace ptx

#endif
