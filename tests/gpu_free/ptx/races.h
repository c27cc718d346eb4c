// Races for a block's shared memory: two accesses, one of them a write, and nothing that orders them. Found whichever comes
// first. Accesses of global memory are handed to races_between.h, with what orders threads of other blocks.
//
// Threads are ordered by what the PTX manual says orders memory: bar.sync and its like, bar.warp.sync among the lanes it names
// (no shuffle or vote, and not that lanes happened to run together), an arrival at an mbarrier and a wait that saw its phase
// over, release and acquire or fences around strong accesses. Asynchronous work is an agent of its own: it begins after its
// issue and is over for the thread that waited for its group, or for who saw the phase of the mbarrier that it completes on.
// Two strong accesses (atomic, volatile, relaxed, ...) are no race, nor are two writes of the same value.
#ifndef PTX_RACES_H
#define PTX_RACES_H

#include <unordered_map>

#include "races_between.h"

namespace ptx {

class Races {
 public:
  explicit Races(Block &);

  // ---- accesses; `offset` and `bytes` are of shared memory ----

  // far: other blocks are in its scope.
  enum Order : int { weak = 0, strong = 1, acquires = 2, releases = 4, far = 8 };
  enum Kind : int { reads = 1, writes = 2, updates = 3 };
  // By a lane, of any memory: `value` is what it is about to store, in `count` elements.
  void access(const Warp &, const Instruction &, int lane, const void *place, size_t bytes, Kind, int order = weak,
              const void *value = nullptr, size_t count = 1);
  // cp.async, from where it takes the first `taken` bytes; a bulk copy to global memory; wgmma's reads of a warp.
  void copy(const Warp &, const Instruction &, int lane, size_t offset, size_t bytes, uint64_t from, size_t taken);
  void bulk_store(const Warp &, const Instruction &, int lane, size_t offset, size_t bytes, uint64_t to);
  void product(const Warp &, const Instruction &, size_t offset, size_t bytes);
  // A bulk copy that completes on an mbarrier, in the phase after `phase` that are over.
  void bulk_copy(const Warp &, const Instruction &, int lane, size_t offset, size_t bytes, Kind, size_t barrier, uint64_t phase);
  void bulk_load(const Warp &, const Instruction &, int lane, uint64_t from, size_t bytes, size_t barrier, uint64_t phase);

  // ---- order ----

  void meet(const Warp &, Lanes members);  // bar.warp.sync
  void fence(const Warp &, Lanes, bool far);
  // Lanes come to a barrier of the block (16: the cluster's); the others of its threads go on after it.
  static constexpr size_t cluster = 16;
  void come(const Warp &, Lanes, size_t barrier);
  void go_on(const Warp &, Lanes, size_t barrier);
  void done(size_t barrier);  // all have gone on
  // mbarriers: arrivals, among them those that come when a lane's copies so far are over, the end of a phase, waits that saw one.
  void init(size_t barrier);
  void arrive(const Warp &, int lane, size_t barrier);
  Known arrival_of_copies(const Warp &, int lane);
  void arrive(const Known &, size_t barrier);
  void phase(size_t barrier, uint64_t over);
  void see_over(const Warp &, Lanes, size_t barrier);
  // Groups of asynchronous work: `stores` are the reads of bulk copies to global memory, `written` their writes.
  // `but`: the latest groups that are not waited for; -1: everything is.
  enum Work : int { copies, stores, written, products };
  void commit(const Warp &, Lanes, Work);
  void wait(const Warp &, Lanes, Work, int64_t but);

 private:
  struct Lane {
    Known known, pending, fenced;   // what it knows; will by the next fence; did at the last
    Known far_pending, far_fenced;  // the same of other blocks, for them
    Groups work[3];                 // copies, stores, written
    // What it read last of a place that orders blocks, to know when it spins.
    struct {
      const void *place = nullptr;
      const Instruction *instruction = nullptr;
      uint32_t epoch = 0;
      Known released;
    } spin;
  };
  struct OfWarp {
    uint32_t epoch = 1;  // of its lanes: one more after each release
    Lane lanes[32];
    Groups products;
  };
  struct Mbarrier {
    int agent = -1;
    Known current, over;
  };
  struct Agent {
    Work work;
    bool bulk;  // on an mbarrier
    size_t of;  // thread, warp, offset of the mbarrier
  };
  // One or more accesses of the same kind to a word: by lanes of a warp (`who` is its lane 0), or by an agent.
  struct Seen {
    uint32_t epoch, who;
    Lanes lanes;
    int instruction;
    uint8_t bytes;  // which of the word's four
    bool write, strong;
  };
  struct Actor {
    const Warp &warp;
    const Instruction &instruction;
    int lane;  // -1: all of the warp's
  };

  OfWarp &of(const Warp &warp) { return warps_[static_cast<size_t>(warp.index)]; }
  Lane &lane_of(const Warp &warp, int lane) { return of(warp).lanes[lane]; }
  uint32_t new_agent(const Agent &);
  uint32_t agent_of(Groups &, const Agent &);
  bool after(const OfWarp &, size_t warp, int lane, size_t number, uint32_t epoch) const;
  bool ordered(const Actor &, const Seen &before) const;
  void see(const Actor &, Seen now, size_t offset, size_t bytes, const void *value);
  void see_word(const Actor &, const Seen &now, size_t word, const void *value);
  // Of global memory; `who` and `epoch` as in Seen.
  void see_between(const Actor &, uint32_t who, uint32_t epoch, Lanes, uint64_t address, size_t bytes, bool write,
                   size_t element = 0);
  bool private_to_thread(const void *place) const;
  [[noreturn]] void fail(const Actor &, const Seen &now, const Seen &before, size_t word) const;
  // What lanes know and do by now, into a clock; then a new epoch begins.
  void publish(Clock &, const Warp &, Lanes);
  template <class F>
  void for_known(const Warp &, Lanes, F);
  // What a lane does, for other blocks; what they did, to one that acquires it.
  Known published(const Warp &, int lane);
  void learn_far(Known &, const Known &far) const;
  void order_far(const Warp &, int lane, RacesBetween::Place &, Kind, int order);
  bool spins(const Warp &, const Instruction &, int lane, const void *place, const RacesBetween::Place &);

  Block &block_;
  RacesBetween *const between_;  // null: the block is the only one
  std::vector<OfWarp> warps_;
  std::vector<Agent> agents_;  // their numbers follow those of the lanes of all warps
  std::vector<std::vector<Seen>> words_;
  Known barriers_[17];
  std::unordered_map<size_t, Mbarrier> mbarriers_;
  std::unordered_map<const void *, Known> places_;  // of strong accesses: what those who wrote there had released
};

// "line 12 "st.global..."", the start of the instruction: those with matrices have hundreds of registers.
std::string named(const Instruction &);

}  // namespace ptx

#endif
