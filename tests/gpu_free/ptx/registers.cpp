// Fewer registers: PTX has one for every value, 24000 in the largest kernels, and all of a warp's should fit a cache.
//
// Registers whose values are never needed at the same time share a slot. A value is needed from where it may be written to
// where it may be read, by the order of the text; branches stretch that over whole basic blocks.
#include <algorithm>
#include <queue>
#include <unordered_set>

#include "lexer.h"

namespace ptx {
namespace {

using Set = std::vector<uint64_t>;

// Instructions that do nothing to their first operand but write it. Of all others every operand counts as read.
bool only_writes(const Instruction &instruction) {
  static const std::unordered_set<std::string> names = {
      "abs",      "add",   "and",  "atom", "bfe",  "bfi", "bfind", "brev", "clz", "cvt",  "cvta", "div",  "ex2",  "fma",  "ld",
      "ldmatrix", "lg2",   "lop3", "mad",  "max",  "min", "mma",   "mov",  "mul", "neg",  "not",  "or",   "popc", "prmt", "rcp",
      "rem",      "rsqrt", "selp", "set",  "setp", "shf", "shfl",  "shl",  "shr", "sqrt", "sub",  "vote", "xor"};
  return instruction.guard < 0 && names.count(instruction.words[0]) > 0;
}

template <class Visit>
void visit_registers(Operand &o, const Visit &visit) {
  if (o.kind == Operand::reg) visit(o.slot);
  for (auto &item : o.items) visit_registers(item, visit);
}

template <class Visit>
void visit_labels(const Operand &o, const Visit &visit) {
  if (o.kind == Operand::label) visit(static_cast<size_t>(o.slot));
  for (const auto &item : o.items) visit_labels(item, visit);
}

struct Range {
  size_t first = SIZE_MAX, last = 0;
  void include(size_t at) {
    first = std::min(first, at);
    last = std::max(last, at);
  }
};

struct BasicBlock {
  size_t begin, end;
  std::vector<size_t> next;
  Set read, written, in;  // read before it is written here; written here; needed at its start
};

class Sharing {
 public:
  explicit Sharing(Function &function) : code_(function.code), words_((static_cast<size_t>(function.slots) + 63) / 64) {
    ranges_.resize(static_cast<size_t>(function.slots));
    own_.resize(static_cast<size_t>(function.slots));
  }

  // The number of slots that are left.
  int share() {
    split();
    for (auto &block : blocks_) look_at(block);
    propagate();
    return assign();
  }

 private:
  void split() {
    std::vector<bool> starts(code_.size() + 1);
    starts[0] = true;
    for (size_t i = 0; i < code_.size(); ++i)
      for (const auto &o : code_[i].operands) visit_labels(o, [&](size_t target) { starts[target] = starts[i + 1] = true; });
    std::vector<size_t> block_of(code_.size() + 1);
    for (size_t i = 0; i < code_.size(); ++i) {
      if (starts[i]) blocks_.push_back({i, i, {}, Set(words_), Set(words_), Set(words_)});
      blocks_.back().end = i + 1;
      block_of[i] = blocks_.size() - 1;
    }
    for (auto &block : blocks_) {
      const auto &last = code_[block.end - 1];
      for (const auto &o : last.operands) visit_labels(o, [&](size_t target) { block.next.push_back(block_of[target]); });
      const bool leaves = last.guard < 0 && (last.words[0] == "bra" || last.words[0] == "brx");
      if (!leaves && block.end < code_.size()) block.next.push_back(block_of[block.end]);
    }
  }

  void look_at(BasicBlock &block) {
    for (size_t i = block.begin; i < block.end; ++i) {
      Instruction &instruction = code_[i];
      const bool writes = only_writes(instruction);
      // What wgmma reads and writes it may touch until a later wait.
      const bool late = instruction.words[0] == "wgmma";
      const auto read = [&](int slot) {
        const size_t s = static_cast<size_t>(slot);
        ranges_[s].include(i);
        if (late) own_[s] = true;
        if (!(block.written[s / 64] >> s % 64 & 1)) block.read[s / 64] |= uint64_t{1} << s % 64;
      };
      if (instruction.guard >= 0) read(instruction.guard);
      for (size_t k = writes; k < instruction.operands.size(); ++k) visit_registers(instruction.operands[k], read);
      if (!writes || instruction.operands.empty()) continue;
      visit_registers(instruction.operands[0], [&](int slot) {
        const size_t s = static_cast<size_t>(slot);
        ranges_[s].include(i);
        block.written[s / 64] |= uint64_t{1} << s % 64;
      });
    }
    block.in = block.read;
  }

  void propagate() {
    for (bool changed = true; changed;) {
      changed = false;
      for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block)
        for (const size_t next : block->next)
          for (size_t w = 0; w < words_; ++w) {
            const uint64_t more = blocks_[next].in[w] & ~block->written[w] & ~block->in[w];
            block->in[w] |= more;
            changed |= more != 0;
          }
    }
    for (const auto &block : blocks_)
      for (size_t w = 0; w < words_; ++w) {
        uint64_t out = 0;
        for (const size_t next : block.next) out |= blocks_[next].in[w];
        for (uint64_t rest = block.in[w]; rest; rest &= rest - 1)
          ranges_[w * 64 + static_cast<size_t>(__builtin_ctzll(rest))].include(block.begin);
        for (; out; out &= out - 1) ranges_[w * 64 + static_cast<size_t>(__builtin_ctzll(out))].include(block.end);
      }
  }

  int assign() {
    std::vector<size_t> order;
    for (size_t s = 0; s < ranges_.size(); ++s)
      if (ranges_[s].first != SIZE_MAX) order.push_back(s);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return ranges_[a].first < ranges_[b].first; });
    using Busy = std::pair<size_t, int>;  // up to where, slot
    std::priority_queue<Busy, std::vector<Busy>, std::greater<Busy>> busy;
    std::vector<int> slots(ranges_.size(), -1);
    int count = 0;
    for (const size_t s : order) {
      if (own_[s]) {
        slots[s] = count++;
        continue;
      }
      // Never the slot of a value that the same instruction reads: others of its lanes may not have read it yet.
      if (!busy.empty() && busy.top().first < ranges_[s].first) {
        slots[s] = busy.top().second;
        busy.pop();
      } else {
        slots[s] = count++;
      }
      busy.push({ranges_[s].last, slots[s]});
    }
    for (auto &instruction : code_) {
      if (instruction.guard >= 0) instruction.guard = slots[static_cast<size_t>(instruction.guard)];
      for (auto &o : instruction.operands) visit_registers(o, [&](int &slot) { slot = slots[static_cast<size_t>(slot)]; });
    }
    return count;
  }

  std::vector<Instruction> &code_;
  const size_t words_;
  std::vector<BasicBlock> blocks_;
  std::vector<Range> ranges_;
  std::vector<bool> own_;  // shared with none
};

}  // namespace

void share_registers(Function &function) { function.slots = Sharing(function).share(); }

}  // namespace ptx
