// Who knows of what, as vector clocks: what races.cpp orders accesses of shared memory by.
//
// Threads of a block have numbers from 0 on, and so have agents behind them, which do asynchronous work: the copies of a
// thread, the matrix products of a warp, the bulk copies that complete on an mbarrier. Each counts its epochs. A clock has,
// by number, the last epoch that whoever has it comes after; what is not in it is 0.
#ifndef PTX_CLOCKS_H
#define PTX_CLOCKS_H

#include <algorithm>

#include "machine.h"

namespace ptx {

using Clock = std::vector<uint32_t>;
using Known = std::shared_ptr<Clock>;  // shared by those who know the same: copied by whoever learns more

inline uint32_t at(const Clock &clock, size_t number) { return number < clock.size() ? clock[number] : 0; }

inline void raise(Clock &clock, size_t number, uint32_t epoch) {
  if (number >= clock.size()) clock.resize(number + 1);
  clock[number] = std::max(clock[number], epoch);
}

inline void merge(Clock &clock, const Clock &other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t k = 0; k < other.size(); ++k) clock[k] = std::max(clock[k], other[k]);
}

inline bool covers(const Clock &clock, const Clock &other) {
  for (size_t k = 0; k < other.size(); ++k)
    if (at(clock, k) < other[k]) return false;
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

// Adds what `other` has.
inline void learn(Known &known, const Known &other) {
  if (other == nullptr || other == known) return;
  if (known == nullptr || covers(*other, *known))
    known = other;
  else if (!covers(*known, *other))
    merge(own(known), *other);
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
