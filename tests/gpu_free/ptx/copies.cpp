// cp.async and cp.async.bulk: each copy is done at some moment between its issue and the wait that covers it, in any order.
#include "async.h"
#include "races.h"

namespace ptx {
namespace {

using Work = std::function<void()>;

// Work on a block's memory, which may be gone when its turn comes: a kernel that ends with copies in flight has lost them.
Work in_block(Block &block, Work work) {
  std::weak_ptr<AsyncState> state = block.async;
  return [state, work = std::move(work)] {
    if (!state.expired()) work();
  };
}

std::shared_ptr<Pending> issue(Warp &w, Queue *queue, const uint32_t *committed, Lanes lanes, Work work) {
  auto pending = std::make_shared<Pending>();
  pending->work = std::move(work);
  pending->lanes = lanes;
  if (queue) {
    if (queue->size() >= 64)
      queue->erase(std::remove_if(queue->begin(), queue->end(), [](const auto &p) { return p->done; }), queue->end());
    std::copy_n(committed, 32, pending->group);
    queue->push_back(pending);
  }
  w.block.grid.deferred.add(reinterpret_cast<uintptr_t>(pending.get()), [pending] { pending->run(); });
  return pending;
}

// Does what the lanes wait for: all groups but the latest `but`, or everything if `but` is -1.
void wait_for(Warp &w, Queue &queue, const uint32_t *committed, Lanes lanes, int64_t but) {
  for (auto &pending : queue) {
    bool due = false;
    for_lanes(lanes & pending->lanes, [&](int lane) {
      due |= but < 0 || static_cast<int64_t>(pending->group[lane]) < static_cast<int64_t>(committed[lane]) - but;
    });
    if (due && !pending->done) w.block.grid.deferred.finish(reinterpret_cast<uintptr_t>(pending.get()));
  }
  queue.erase(std::remove_if(queue.begin(), queue.end(), [](const auto &p) { return p->done; }), queue.end());
}

AsyncState::Issued &issued(Warp &w) { return async_state(w.block).warps[static_cast<size_t>(w.index)]; }

// ---- cp.async ----

enum Detail { bytes, control, bulk, reading };  // control: 0 none, 1 src-size, 2 ignore-src: operand 3

Outcome copy(Warp &w, const Instruction &in, Lanes lanes) {
  struct Part {
    size_t to;
    uint64_t from;
    size_t taken;
  };
  const size_t size = static_cast<size_t>(in.detail[bytes]);
  auto parts = std::make_shared<std::vector<Part>>();
  for_lanes(lanes, [&](int lane) {
    const uint64_t from = w.address(in.operands[1], lane);
    size_t taken = size;
    if (in.detail[control] == 1) taken = static_cast<uint32_t>(w.get(in.operands[3], lane));
    if (in.detail[control] == 2 && (w.get(in.operands[3], lane) != 0) != in.operands[3].negated) taken = 0;
    if (taken > size) w.fail(in, lane, "src-size is larger than cp-size");
    if (taken && from % size) w.fail(in, lane, "the source is not aligned to " + std::to_string(size) + " bytes");
    if (taken && from & window_mask) w.fail(in, lane, "the source is not in global memory");
    if (taken) check_global(w, in, lane, from, taken);
    parts->push_back({shared_offset(w, in, lane, w.address(in.operands[0], lane), size, size), from, taken});
    if (w.block.races) w.block.races->copy(w, in, lane, parts->back().to, size, from, taken);
  });
  auto &mine = issued(w);
  Block *block = &w.block;
  issue(w, &mine.copies, mine.committed, lanes, in_block(w.block, [parts, block, size] {
          for (const Part &part : *parts) {
            unsigned char *to = block->shared.bytes.data() + part.to;
            std::memcpy(to, reinterpret_cast<const void *>(part.from), part.taken);
            std::memset(to + part.taken, 0, size - part.taken);
            // No fence is asked for before wgmma: CUTLASS' main loop of cp.async and wgmma has none, nor has Triton 3.6's.
            if (size == 16) mark(*block, part.to, size, false);
          }
        }));
  return Outcome::next;
}

Outcome commit(Warp &w, const Instruction &in, Lanes lanes) {
  auto &mine = issued(w);
  for_lanes(lanes, [&](int lane) { ++(in.detail[bulk] ? mine.bulk_committed : mine.committed)[lane]; });
  if (Races *const races = w.block.races.get()) {
    races->commit(w, lanes, in.detail[bulk] ? Races::stores : Races::copies);
    if (in.detail[bulk]) races->commit(w, lanes, Races::written);
  }
  return Outcome::next;
}

Outcome wait_group(Warp &w, const Instruction &in, Lanes lanes) {
  auto &mine = issued(w);
  const int64_t but = static_cast<int64_t>(w.get(in.operands[0], 0));
  if (!in.detail[bulk]) {
    wait_for(w, mine.copies, mine.committed, lanes, but);
  } else {
    wait_for(w, mine.reads, mine.bulk_committed, lanes, but);
    if (!in.detail[reading]) wait_for(w, mine.writes, mine.bulk_committed, lanes, but);
  }
  if (Races *const races = w.block.races.get()) {
    races->wait(w, lanes, in.detail[bulk] ? Races::stores : Races::copies, but);
    if (in.detail[bulk] && !in.detail[reading]) races->wait(w, lanes, Races::written, but);
  }
  return Outcome::next;
}

Outcome wait_all(Warp &w, const Instruction &, Lanes lanes) {
  auto &mine = issued(w);
  wait_for(w, mine.copies, mine.committed, lanes, -1);
  if (w.block.races) w.block.races->wait(w, lanes, Races::copies, -1);
  return Outcome::next;
}

// cp.async.mbarrier.arrive: arrives when the lane's copies so far are done.
Outcome arrive_after(Warp &w, const Instruction &in, Lanes lanes) {
  auto &mine = issued(w);
  Warp *warp = &w;
  const Instruction *instruction = &in;
  for_lanes(lanes, [&](int lane) {
    const size_t offset = shared_offset(w, in, lane, w.address(in.operands[0], lane), 8, 8);
    barrier_at(w, in, lane, offset);
    if (!has(in, "noinc")) expect_arrival(w, in, lane, offset);
    Known known;
    if (w.block.races) known = w.block.races->arrival_of_copies(w, lane);
    Queue before;
    for (const auto &pending : mine.copies)
      if (pending->lanes >> lane & 1) before.push_back(pending);
    issue(w, nullptr, nullptr, 1u << lane, in_block(w.block, [=] {
            for (const auto &pending : before) pending->run();
            barrier_at(*warp, *instruction, lane, offset);
            if (known) warp->block.races->arrive(known, offset);
            arrive(*warp, *instruction, lane, offset, 1);
          }));
  });
  return Outcome::next;
}

// ---- cp.async.bulk ----

size_t bulk_size(Warp &w, const Instruction &in, int lane) {
  const uint64_t size = static_cast<uint32_t>(w.get(in.operands[2], lane));
  if (size % 16) w.fail(in, lane, "a bulk copy of " + std::to_string(size) + " bytes: not a multiple of 16");
  return size;
}

void check_bulk(Warp &w, const Instruction &in, int lane, uint64_t address, size_t size) {
  if (address % 16) w.fail(in, lane, "a bulk copy's global address is not aligned to 16 bytes");
  if (address & window_mask) w.fail(in, lane, "a bulk copy's address is not in global memory");
  check_global(w, in, lane, address, size);
}

void check_fenced(Warp &w, const Instruction &in, int lane, size_t from, size_t size) {
  for (size_t i = from / 16; i < (from + size) / 16; ++i)
    if (w.block.shared.unfenced[i])
      w.fail(in, lane, "reads shared offset " + std::to_string(i * 16) + ", written with no fence.proxy.async since");
}

// To shared memory, from global or shared memory; a barrier counts the bytes.
Outcome bulk_in(Warp &w, const Instruction &in, Lanes lanes) {
  const bool from_shared = in.detail[reading];
  async_state(w.block);
  Warp *warp = &w;
  const Instruction *instruction = &in;
  for_lanes(lanes, [&](int lane) {
    const size_t size = bulk_size(w, in, lane);
    const size_t to = shared_offset(w, in, lane, w.address(in.operands[0], lane), size, 16);
    uint64_t from = w.address(in.operands[1], lane);
    if (from_shared)
      check_fenced(w, in, lane, from = shared_offset(w, in, lane, from, size, 16), size);
    else
      check_bulk(w, in, lane, from, size);
    const size_t barrier = shared_offset(w, in, lane, w.address(in.operands[3], lane), 8, 8);
    const Barrier &counts = barrier_at(w, in, lane, barrier);
    if (!counts.fenced) w.fail(in, lane, "the mbarrier was initialised with no fence (mbarrier_init or proxy.async) since");
    if (Races *races = w.block.races.get()) {
      races->access(w, in, lane, w.block.shared.bytes.data() + barrier, 8, Races::updates, Races::strong);
      races->arrive(w, lane, barrier);
      if (from_shared)
        races->bulk_copy(w, in, lane, from, size, Races::reads, barrier, counts.phase);
      else
        races->bulk_load(w, in, lane, from, size, barrier, counts.phase);
      races->bulk_copy(w, in, lane, to, size, Races::writes, barrier, counts.phase);
    }
    issue(w, nullptr, nullptr, 1u << lane, in_block(w.block, [=] {
            unsigned char *shared = warp->block.shared.bytes.data();
            std::memmove(shared + to, from_shared ? shared + from : reinterpret_cast<const unsigned char *>(from), size);
            mark(warp->block, to, size, false);
            complete_transactions(*warp, *instruction, lane, barrier, static_cast<int64_t>(size));
          }));
  });
  return Outcome::next;
}

// From shared to global memory: the source is read, then the destination written.
Outcome bulk_out(Warp &w, const Instruction &in, Lanes lanes) {
  auto &mine = issued(w);
  Warp *warp = &w;
  const Instruction *instruction = &in;
  for_lanes(lanes, [&](int lane) {
    const size_t size = bulk_size(w, in, lane);
    const uint64_t to = w.address(in.operands[0], lane);
    check_bulk(w, in, lane, to, size);
    const size_t from = shared_offset(w, in, lane, w.address(in.operands[1], lane), size, 16);
    check_fenced(w, in, lane, from, size);
    if (w.block.races) w.block.races->bulk_store(w, in, lane, from, size, to);
    auto data = std::make_shared<std::vector<unsigned char>>(size);
    auto there = std::make_shared<bool>(false);
    auto read = issue(w, &mine.reads, mine.bulk_committed, 1u << lane, in_block(w.block, [=] {
                        check_fenced(*warp, *instruction, lane, from, size);
                        std::copy_n(warp->block.shared.bytes.data() + from, size, data->data());
                        *there = true;
                      }));
    issue(w, &mine.writes, mine.bulk_committed, 1u << lane, [=] {
      read->run();
      if (*there) std::memcpy(reinterpret_cast<void *>(to), data->data(), size);
    });
  });
  return Outcome::next;
}

Outcome nothing(Warp &, const Instruction &, Lanes) { return Outcome::next; }

bool decode_bulk(Instruction &in) {
  if (has(in, "tensor")) return false;
  if (in.words[3] == "commit_group" || in.words[3] == "wait_group") {
    in.execute = in.words[3] == "commit_group" ? commit : wait_group;
    in.detail[bulk] = 1;
    in.detail[reading] = has(in, "read");
    return true;
  }
  if (in.words[3] == "prefetch") {
    in.execute = nothing;
    return true;
  }
  if (has(in, "multicast::cluster") || has(in, "cp_mask")) return false;
  const std::string &to = in.words[3], &from = in.words[4];
  if (to == "global" && from == "shared::cta" && has(in, "bulk_group")) {
    in.execute = bulk_out;
    return true;
  }
  if ((to == "shared::cluster" || to == "shared::cta") && (from == "global" || from == "shared::cta") &&
      has(in, "mbarrier::complete_tx::bytes")) {
    in.execute = bulk_in;
    in.detail[reading] = from == "shared::cta";
    return true;
  }
  return false;
}

}  // namespace

bool decode_copy(Instruction &in) {
  if (in.words.size() < 3 || in.words[1] != "async") return false;
  if (in.words[2] == "bulk") return in.words.size() > 3 && decode_bulk(in);
  if (in.words[2] == "commit_group") {
    in.execute = commit;
  } else if (in.words[2] == "wait_group") {
    in.execute = wait_group;
  } else if (in.words[2] == "wait_all") {
    in.execute = wait_all;
  } else if (in.words[2] == "mbarrier") {
    in.execute = arrive_after;
  } else if (in.words[2] == "ca" || in.words[2] == "cg") {
    in.execute = copy;
    const uint64_t size = in.operands[2].bits;
    if (size != 16 && (in.words[2] == "cg" || (size != 4 && size != 8))) return false;
    in.detail[bytes] = static_cast<int>(size);
    // [dst], [src], cp-size {, src-size or ignore-src} {, cache-policy}
    const size_t operands = in.operands.size() - (has(in, "L2::cache_hint") ? 1 : 0);
    if (operands > 3) in.detail[control] = in.operands[3].kind == Operand::reg && in.operands[3].width == 1 ? 2 : 1;
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx
