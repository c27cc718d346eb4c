// The scheduler behind host_execution.h: which block goes on, and what fibres call.
//
// Blocks run one after another on the calling thread, those of a cooperative launch in turns: host_execution_block.h.
#include "cuda/host_execution_block.h"

namespace vqk {
namespace host {
namespace {

constexpr size_t most_together = 64;  // blocks of a cooperative launch: all have their stacks at once

// The blocks of a cooperative launch, and how many of their threads have come to grid_barrier().
struct Together {
  std::vector<std::unique_ptr<Block>> blocks;
  size_t expected = 0, arrived = 0;
};
thread_local Together *together = nullptr;

}  // namespace

namespace {
int64_t count_of_launches = 0;
size_t shared_limit = 227 * 1024;
}  // namespace

void set_seed(uint64_t value) { seed = value; }
int64_t launches() { return count_of_launches; }
void set_shared_limit(size_t bytes) { shared_limit = bytes; }

void error(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  running->stop(format, arguments);
}

void *shared_memory(size_t bytes) { return running->shared(bytes); }
void barrier(int id, int threads, bool wait, const char *what) { running->barrier(id, threads, wait, what); }
const unsigned char *exchange_bytes(uint32_t mask, const char *what, const void *value, size_t bytes) {
  return running->exchange(mask, what, value, bytes);
}
void sleep(const void *key, const char *what) { running->sleep(key, what); }
void wake(const void *key) { running->wake(key); }
void engine(std::function<void()> work) { running->engine(std::move(work)); }

void issue(int queue, std::function<void()> work) {
  auto &groups = running->fibre().groups[queue];
  if (groups.empty()) groups.emplace_back();
  // At once, or as late as can be. Matrix products happen in their order: each may add to the one before.
  bool free = true;
  if (queue == 1)
    for (const auto &group : groups) free &= group.empty();
  if (free && running->chance())
    work();
  else
    groups.back().push_back(std::move(work));
}
void commit(int queue) {
  auto &groups = running->fibre().groups[queue];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
void wait(int queue, int allowed) {
  auto &groups = running->fibre().groups[queue];
  // The open group is none yet.
  while (static_cast<int>(groups.size()) > allowed + 1) {
    for (auto &work : groups.front()) work();
    groups.erase(groups.begin());
  }
}

void grid_barrier() {
  if (together == nullptr) error("grid_barrier, but the launch is not cooperative");
  if (++together->arrived < together->expected) return running->sleep(together, "grid_barrier");
  together->arrived = 0;
  for (auto &block : together->blocks) block->wake(together);
}

void start_kernel() { running->fibre().started = true; }

namespace {

// All blocks in turns: each as far as it goes, anyone at any time, or some of them starve.
int32_t run_together(const char *what, const std::vector<uint3> &order, dim3 threads, size_t shared,
                     const std::function<void()> &body, std::mt19937_64 &random) {
  if (order.size() > most_together)
    return fail(VQK_UNSUPPORTED, "%s: %zu blocks at a time, %zu fit", what, order.size(), most_together);
  Together all;
  std::vector<uint64_t> rank;
  all.expected = order.size() * threads.x * threads.y * threads.z;
  together = &all;
  for (const uint3 id : order) {
    all.blocks.emplace_back(new Block(threads, shared, body));
    all.blocks.back()->start(id, random);
    rank.push_back(seed == 0 ? rank.size() : random());
  }
  const uint64_t policy = seed == 0 ? 0 : random() % 3;
  Block *failed = nullptr, *next = nullptr;
  while (failed == nullptr) {
    if (policy != 0 || next == nullptr || next->stuck()) {
      next = nullptr;
      size_t most = 0, seen = 0;
      for (size_t i = 0; i < all.blocks.size(); ++i) {
        if (all.blocks[i]->stuck()) continue;
        ++seen;
        // Among those that can go on, one by chance, or the one that always comes first.
        if (next == nullptr || (policy == 1 ? random() % seen == 0 : rank[i] < rank[most])) next = all.blocks[most = i].get();
      }
    }
    if (next != nullptr) {
      next->advance();
      if (next->failed()) failed = next;
      continue;
    }
    for (auto &block : all.blocks)
      if (failed == nullptr && !block->done()) (failed = block.get())->report_deadlock();
    break;
  }
  for (auto &block : all.blocks) block->finish();
  together = nullptr;
  return failed == nullptr ? int32_t{VQK_OK} : fail(VQK_INTERNAL, "%s: %s", what, failed->message());
}

}  // namespace

int32_t run(const char *what, dim3 grid, dim3 threads, size_t shared, bool cooperative, const std::function<void()> &body) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, size = uint64_t{threads.x} * threads.y * threads.z;
  if (blocks == 0) return VQK_OK;
  ++count_of_launches;
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return fail(VQK_INTERNAL, "%s: a grid of %u x %u x %u blocks", what, grid.x, grid.y, grid.z);
  if (size == 0 || size > 1024 || threads.z > 64 || shared > shared_limit)
    return fail(VQK_INTERNAL, "%s: blocks of %u x %u x %u threads with %zu bytes", what, threads.x, threads.y, threads.z, shared);
  std::mt19937_64 random(seed);
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (seed != 0) std::shuffle(order.begin(), order.end(), random);
  ids.blocks = grid;
  std::vector<uint3> places;
  for (const uint64_t i : order)
    places.push_back({static_cast<uint32_t>(i % grid.x), static_cast<uint32_t>(i / grid.x % grid.y),
                      static_cast<uint32_t>(i / grid.x / grid.y)});
  if (cooperative) return run_together(what, places, threads, shared, body, random);
  Block block(threads, shared, body);
  for (const uint3 id : places) {
    if (!block.run(id, random)) return fail(VQK_INTERNAL, "%s: %s", what, block.message());
  }
  return VQK_OK;
}

}  // namespace host
}  // namespace vqk
