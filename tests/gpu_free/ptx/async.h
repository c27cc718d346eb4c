// What async.cpp, mbarrier.cpp and copies.cpp keep per block, and how they share the decoding.
#ifndef PTX_ASYNC_H
#define PTX_ASYNC_H

#include <algorithm>
#include <unordered_map>

#include "machine.h"

namespace ptx {

struct Barrier {
  uint64_t phase = 0;  // how many are complete
  uint32_t expected, pending;
  int64_t transactions = 0;
  bool observed = false;  // somebody's wait said that the phase before this one is complete
  bool fenced = false;    // its initialisation is visible to the async proxy

  // What a thread would see in the eight bytes: ordinary stores over it are noticed by the difference.
  uint64_t word() const {
    return phase << 63 | static_cast<uint64_t>(pending) << 41 | static_cast<uint64_t>(transactions & 0x1f'ffff) << 20 | expected;
  }
};

// One asynchronous copy. Done when the grid's Deferred chooses, or when somebody waits for it.
struct Pending {
  std::function<void()> work;
  bool done = false;
  Lanes lanes = 0;
  uint32_t group[32] = {};  // of each of its lanes: how many groups that lane had committed before

  void run() {
    if (done) return;
    done = true;
    work();
  }
};
using Queue = std::vector<std::shared_ptr<Pending>>;

struct AsyncState {
  // What a warp has issued and not waited for: `copies` cp.async, `reads` and `writes` the halves of bulk copies to global
  // memory.
  struct Issued {
    Queue copies, reads, writes;
    uint32_t committed[32] = {}, bulk_committed[32] = {};
    int registers = 0;  // per thread, where setmaxnreg is followed
  };
  std::vector<Issued> warps;
  std::unordered_map<size_t, Barrier> barriers;  // by offset
  int registers = -1;                            // free ones of the block; -1: unknown yet, -2: not known at all
  // barrier.cluster: how many threads have arrived, which arrival is in progress, and the one that each thread made.
  int arrived = 0;
  uint64_t generation = 1;
  std::vector<uint64_t> generation_of;
};

inline AsyncState &async_state(Block &block) {
  if (!block.async) {
    block.async = std::make_shared<AsyncState>();
    block.async->warps.resize(block.warps.size());
    block.async->generation_of.resize(block.warps.size() * 32);
  }
  return *block.async;
}

inline bool has(const Instruction &in, const char *word) {
  return std::find(in.words.begin(), in.words.end(), word) != in.words.end();
}

template <class F>
void for_lanes(Lanes lanes, F f) {
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) f(lane);
}

// Offset in shared memory of `bytes` bytes that an instruction names.
inline size_t shared_offset(Warp &w, const Instruction &in, int lane, uint64_t address, size_t bytes, size_t align) {
  return static_cast<size_t>(w.block.shared_at(w, in, lane, address, bytes, align) - w.block.shared.bytes.data());
}

// Bytes written by ordinary stores, or by copies: see Shared::unfenced.
inline void mark(Block &block, size_t offset, size_t bytes, bool unfenced) {
  for (size_t i = offset / 16; i < (offset + bytes + 15) / 16; ++i) block.shared.unfenced[i] = unfenced;
}

bool decode_mbarrier(Instruction &);
bool decode_copy(Instruction &);
// The barrier at an offset, or an Error.
Barrier &barrier_at(Warp &, const Instruction &, int lane, size_t offset);
void arrive(Warp &, const Instruction &, int lane, size_t offset, uint32_t count);
void complete_transactions(Warp &, const Instruction &, int lane, size_t offset, int64_t bytes);
// The pending count goes up by one: cp.async.mbarrier.arrive without .noinc.
void expect_arrival(Warp &, const Instruction &, int lane, size_t offset);

}  // namespace ptx

#endif
