// Which warp goes on, which of its lanes, and for how long.
#include <climits>
#include <numeric>

#include "races.h"

namespace ptx {
namespace {

constexpr size_t resident = 4;              // blocks at once, of grids that are not cooperative
constexpr int patience = 4;                 // impatient rounds that change nothing before a grid is deadlocked
constexpr uint32_t fairness = 256;          // every so often, lanes other than those furthest behind go on
constexpr uint64_t longest_spin = 1 << 26;  // quiet instructions, of all warps in a row, before they are a deadlock
constexpr uint64_t longest_run = 1024;      // instructions before another warp's turn: others may spin on what one has to do

int first_lane(Lanes lanes) { return __builtin_ctz(lanes); }

void set_pc(Warp &warp, Lanes lanes, int pc) {
  if (lanes == ~Lanes{0}) {
    for (int &of_lane : warp.pc) of_lane = pc;
    return;
  }
  for (; lanes; lanes &= lanes - 1) warp.pc[first_lane(lanes)] = pc;
}

// Lanes whose guard holds. Slots are shared: lanes that are elsewhere may keep anything in this one.
Lanes guarded(const Warp &warp, const Instruction &instruction, Lanes lanes) {
  const uint64_t *guard = warp.registers.data() + static_cast<size_t>(instruction.guard) * 32;
  Lanes holds = 0;
  for (int lane = 0; lane < 32; ++lane) holds |= static_cast<Lanes>(guard[lane] & 1) << lane;
  return lanes & (instruction.guard_negated ? ~holds : holds);
}

class Scheduler {
 public:
  explicit Scheduler(Grid &grid) : grid_(grid), random_(grid.deferred.random != nullptr) {
    total_ = uint64_t{grid.size[0]} * grid.size[1] * grid.size[2];
    if (!random_) return;
    // Blocks in another order: multiples of a number that has no divisor in common with theirs.
    order_ = static_cast<Order>(next_random(grid_.random) % 3);
    first_ = next_random(grid_.random) % total_;
    do step_ = 1 + next_random(grid_.random) % total_;
    while (std::gcd(step_, total_) != 1);
  }

  void run() {
    fill();
    while (!grid_.blocks.empty()) {
      if (random_ && next_random(grid_.random) % 4 == 0 && grid_.deferred.some()) ++moved_;
      Warp *warp = pick();
      if (warp == nullptr) {
        unblock();
      } else {
        run_warp(*warp, length(), false);
        if (warp->block.exited == warp->block.threads) retire(warp->block);
      }
    }
    grid_.deferred.all();
  }

 private:
  // Who goes on: anyone; the same warp as long as it can, then the next; those that happen to be first, others starve.
  enum Order { anyone, eager, starving };

  void fill() {
    const size_t room = grid_.attributes.cooperative ? total_ : resident;
    while (grid_.blocks.size() < room && started_ < total_) {
      uint64_t linear = started_++;
      if (random_) linear = static_cast<uint64_t>((static_cast<unsigned __int128>(linear) * step_ + first_) % total_);
      add_block(linear);
    }
    warps_.clear();
    for (const auto &block : grid_.blocks)
      for (const auto &warp : block->warps) warps_.push_back(warp.get());
    cursor_ = 0;
    front_ = random_ ? next_random(grid_.random) : 0;
  }

  void add_block(uint64_t linear) {
    const Function &function = grid_.function;
    const uint32_t *size = grid_.block_size;
    grid_.blocks.push_back(std::unique_ptr<Block>(new Block{grid_}));
    Block &block = *grid_.blocks.back();
    block.number = static_cast<uint32_t>(linear);
    block.index[0] = static_cast<uint32_t>(linear % grid_.size[0]);
    block.index[1] = static_cast<uint32_t>(linear / grid_.size[0] % grid_.size[1]);
    block.index[2] = static_cast<uint32_t>(linear / grid_.size[0] / grid_.size[1]);
    block.threads = static_cast<int>(size[0] * size[1] * size[2]);
    block.shared.bytes.assign(function.shared + grid_.dynamic_shared, 0xff);
    block.shared.unfenced.assign((block.shared.bytes.size() + 15) / 16, 0);
    block.local.assign(function.local * static_cast<size_t>(block.threads), 0xff);
    for (int first = 0; first < block.threads; first += 32) {
      block.warps.push_back(std::unique_ptr<Warp>(new Warp{block, first / 32}));
      Warp &warp = *block.warps.back();
      const int lanes = std::min(32, block.threads - first);
      warp.live = lanes == 32 ? ~Lanes{0} : (Lanes{1} << lanes) - 1;
      warp.early = grid_.attributes.programmatic ? warp.live : 0;
      watch(warp);
      warp.stalled = ~uint64_t{0};
      if (!spare_.empty()) {
        warp.registers = std::move(spare_.back());
        spare_.pop_back();
      }
      warp.registers.assign(static_cast<size_t>(function.slots) * 32, 0);
    }
    if (grid_.races) block.races = std::make_shared<Races>(block);
  }

  void retire(Block &block) {
    grid_.deferred.all();  // it may be the block's
    ++moved_;
    for (auto &warp : block.warps) spare_.push_back(std::move(warp->registers));
    for (auto own = grid_.blocks.begin(); own != grid_.blocks.end(); ++own)
      if (own->get() == &block) {
        grid_.blocks.erase(own);
        break;
      }
    fill();
  }

  uint64_t length() {
    if (!random_) return longest_run;
    const uint64_t draw = next_random(grid_.random);
    return order_ == anyone ? uint64_t{1} << draw % 8 : uint64_t{1} << (4 + draw % 8);
  }

  // The next warp, of those that have not seen in vain what moved last; null if all have.
  Warp *pick() {
    if (random_ && (order_ == anyone || next_random(grid_.random) % 16 == 0))
      cursor_ = next_random(grid_.random) % warps_.size();
    else if (random_ && order_ == starving)
      cursor_ = front_ % warps_.size();
    for (size_t i = 0; i < warps_.size(); ++i) {
      Warp *warp = warps_[cursor_];
      if (!random_ || order_ != eager || !can_go(*warp)) cursor_ = cursor_ + 1 == warps_.size() ? 0 : cursor_ + 1;
      if (can_go(*warp)) return warp;
    }
    return nullptr;
  }

  bool can_go(const Warp &warp) const { return warp.live != 0 && warp.stalled != moved_; }

  // The lanes that go on, and the nearest pc behind theirs at which others are; none if all of them wait.
  Lanes choose(Warp &warp, int &others) {
    const Lanes ready = warp.live & ~warp.waiting;
    if (ready == 0) return 0;
    int pc = warp.pc[first_lane(ready)];
    const bool unfair = random_ ? next_random(grid_.random) % 16 == 0 : ++choices_ % fairness == 0;
    if (unfair) {
      Lanes from = ready & (~Lanes{0} << next_random(grid_.random) % 32);
      pc = warp.pc[first_lane(from ? from : ready)];
    } else {
      for (Lanes rest = ready & (ready - 1); rest; rest &= rest - 1) pc = std::min(pc, warp.pc[first_lane(rest)]);
    }
    Lanes group = 0;
    others = INT_MAX;
    for (Lanes rest = warp.live; rest; rest &= rest - 1) {
      const int lane = first_lane(rest), at = warp.pc[lane];
      if (at == pc) group |= Lanes{1} << lane;
      if (at > pc && at < others) others = at;
    }
    return group;
  }

  // Up to `most` instructions, or until all lanes wait; with `once`, until something moved.
  void run_warp(Warp &warp, uint64_t most, bool once) {
    const Instruction *code = grid_.function.code.data();
    uint64_t done = 0, at_last_wait = 0;
    bool in_vain = false, quiet = true;
    warp.waiting = 0;
    while (done < most && warp.live && !(once && done)) {
      int others = 0;
      Lanes group = choose(warp, others);
      if (group == 0) {
        in_vain = done == at_last_wait;
        if (in_vain) break;
        // They may wait for what other lanes of the warp have done since.
        at_last_wait = done;
        warp.waiting = 0;
        continue;
      }
      for (int pc = warp.pc[first_lane(group)];; ++pc) {
        const Instruction &instruction = code[pc];
        const Lanes lanes = instruction.guard < 0 ? group : guarded(warp, instruction, group);
        quiet &= instruction.quiet;
        const Outcome outcome = lanes ? instruction.execute(warp, instruction, lanes) : Outcome::next;
        if (outcome == Outcome::next) {
          set_pc(warp, group, pc + 1);
          warp.waiting &= ~group;
          if (++done >= most || pc + 1 == others || once) break;
          continue;
        }
        set_pc(warp, group & ~lanes, pc + 1);
        done += outcome != Outcome::wait || lanes != group;
        if (outcome == Outcome::wait) {
          warp.waiting |= lanes;
        } else {
          warp.waiting &= ~group;
          if (outcome == Outcome::exited) {
            warp.live &= ~lanes;
            warp.block.exited += __builtin_popcount(lanes);
          }
        }
        break;
      }
    }
    grid_.instructions += done;
    quiet_ = quiet ? quiet_ + done : 0;
    if (quiet_ > longest_spin) deadlock();
    if (done) ++moved_;
    if (in_vain) warp.stalled = moved_;
  }

  // Nothing moves: work that is due, then waits that give up, then the end.
  void unblock() {
    ++moved_;
    if (grid_.deferred.some()) return;
    uint64_t places = 0;
    for (const Warp *warp : warps_)
      for (Lanes rest = warp->live; rest; rest &= rest - 1)
        places = places * 31 + static_cast<uint64_t>(warp->pc[first_lane(rest)]) + warp->live;
    rounds_ = places == places_ ? rounds_ + 1 : 0;
    places_ = places;
    if (rounds_ == patience) deadlock();
    grid_.impatient = true;
    for (Warp *warp : warps_)
      if (warp->live) run_warp(*warp, longest_run, true);
    grid_.impatient = false;
    ++moved_;
    for (size_t i = 0; i < grid_.blocks.size();) {
      Block &block = *grid_.blocks[i];
      if (block.exited != block.threads) {
        ++i;
      } else {
        retire(block);
        i = 0;
      }
    }
  }

  [[noreturn]] void deadlock() const {
    std::string message = "deadlock of kernel " + grid_.function.name + ":";
    int listed = 0;
    for (const Warp *warp : warps_)
      for (Lanes rest = warp->live; rest;) {
        const int pc = warp->pc[first_lane(rest)];
        Lanes group = 0;
        for (Lanes lanes = rest; lanes; lanes &= lanes - 1)
          if (warp->pc[first_lane(lanes)] == pc) group |= lanes & -lanes;
        rest &= ~group;
        if (++listed > 6) continue;
        const Instruction &instruction = grid_.function.code[static_cast<size_t>(pc)];
        const uint32_t *at = warp->block.index;
        char lanes[32];
        std::snprintf(lanes, sizeof lanes, "%08x", group);
        message += "\n  block (" + std::to_string(at[0]) + "," + std::to_string(at[1]) + "," + std::to_string(at[2]) +
                   "), warp " + std::to_string(warp->index) + ", lanes " + lanes + " are at line " +
                   std::to_string(instruction.line) + ": " + instruction.text;
      }
    if (listed > 6) message += "\n  and " + std::to_string(listed - 6) + " more";
    throw Error(message);
  }

  Grid &grid_;
  const bool random_;
  Order order_ = anyone;
  uint64_t total_, started_ = 0, first_ = 0, step_ = 1;
  std::vector<Warp *> warps_;  // of the resident blocks
  size_t cursor_ = 0;
  uint64_t front_ = 0;
  uint64_t moved_ = 0;  // changes whenever something did that others may wait for
  uint32_t choices_ = 0;
  uint64_t quiet_ = 0;  // instructions since the last that was not
  int rounds_ = 0;
  uint64_t places_ = 0;
  std::vector<std::vector<uint64_t>> spare_;
};

}  // namespace

void run_blocks(Grid &grid) { Scheduler(grid).run(); }

}  // namespace ptx
