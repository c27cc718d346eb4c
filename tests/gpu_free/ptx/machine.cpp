// What instructions ask their warp, block and grid for, and the checks of a launch.
#include <mutex>

#include "races_between.h"

namespace ptx {
namespace {

// Launches come one after another: ctypes lets other Python threads go on while one runs.
std::mutex launching;
uint64_t seed = 0;
size_t shared_limit = 227 * 1024;
bool looks_for_races = false;
Counts total{0, 0};

std::string triple(const uint32_t at[3]) {
  return "(" + std::to_string(at[0]) + "," + std::to_string(at[1]) + "," + std::to_string(at[2]) + ")";
}

std::string triple(uint32_t number, const uint32_t size[3]) {
  const uint32_t at[3] = {number % size[0], number / size[0] % size[1], number / size[0] / size[1]};
  return triple(at);
}

}  // namespace

uint64_t next_random(uint64_t &state) {
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

void set_seed(uint64_t value) {
  const std::lock_guard<std::mutex> lock(launching);
  seed = value;
}

void set_races(bool on) {
  const std::lock_guard<std::mutex> lock(launching);
  looks_for_races = on;
}

void set_shared_limit(size_t bytes) {
  const std::lock_guard<std::mutex> lock(launching);
  shared_limit = bytes;
}

Counts counts() {
  const std::lock_guard<std::mutex> lock(launching);
  return total;
}

uint64_t Warp::special(const Operand &o, int lane) const {
  const Grid &grid = block.grid;
  const uint32_t *size = grid.block_size;
  const uint32_t linear = static_cast<uint32_t>(thread(lane)), bit = 1u << lane;
  const uint64_t workspace = grid.attributes.cooperative ? reinterpret_cast<uint64_t>(grid.workspace.data()) : 0;
  if (o.kind != Operand::special)
    throw Error("kernel " + grid.function.name + ": the operand \"" + o.text + "\" is used as a value and has none");
  switch (o.slot) {
    case tid_x: return linear % size[0];
    case tid_y: return linear / size[0] % size[1];
    case tid_z: return linear / (size[0] * size[1]);
    case ntid_x:
    case ntid_y:
    case ntid_z: return size[o.slot - ntid_x];
    case ctaid_x:
    case ctaid_y:
    case ctaid_z: return block.index[o.slot - ctaid_x];
    case nctaid_x:
    case nctaid_y:
    case nctaid_z: return grid.size[o.slot - nctaid_x];
    case laneid: return static_cast<uint64_t>(lane);
    case warpid: return static_cast<uint64_t>(index);
    case nwarpid: return 64;
    case smid: return block.index[0] % 132;
    case nsmid: return 132;
    case gridid:
    case cluster_rank:
    case cluster_ctaid: return 0;
    case cluster_blocks:
    case cluster_nctaid: return 1;
    case clock:
    case globaltimer: return grid.instructions;
    case lanemask_lt: return bit - 1;
    case lanemask_le: return bit | (bit - 1);
    case lanemask_gt: return ~(bit | (bit - 1));
    case lanemask_ge: return ~(bit - 1);
    case lanemask_eq: return bit;
    case dynamic_smem_size: return grid.dynamic_shared;
    case total_smem_size: return block.shared.bytes.size();
    case envreg1: return workspace >> 32;
    case envreg2: return workspace & 0xffffffff;
    default: throw Error("special register " + o.text + " has no value");
  }
}

std::string thread_name(const Grid &grid, uint32_t thread) { return triple(thread, grid.block_size); }
std::string block_name(const Grid &grid, uint32_t block) { return triple(block, grid.size); }

void Warp::fail(const Instruction &instruction, int lane, const std::string &why) const {
  const Grid &grid = block.grid;
  std::string where = "kernel " + grid.function.name + ", line " + std::to_string(instruction.line) + " \"" + instruction.text +
                      "\", block " + triple(block.index) + ", ";
  if (lane < 0) {
    where += "warp " + std::to_string(index);
  } else {
    where += "thread " + thread_name(grid, static_cast<uint32_t>(thread(lane)));
  }
  throw Error(where + ": " + why);
}

unsigned char *Block::shared_at(const Warp &warp, const Instruction &instruction, int lane, uint64_t offset, size_t bytes,
                                size_t align) {
  if ((offset & window_mask) == shared_window) offset -= shared_window;
  if (offset % align != 0)
    warp.fail(instruction, lane, "shared memory at " + std::to_string(offset) + " is not aligned to " + std::to_string(align));
  if (offset > shared.bytes.size() || bytes > shared.bytes.size() - offset)
    warp.fail(instruction, lane,
              std::to_string(bytes) + " bytes at " + std::to_string(offset) + " are not in the block's " +
                  std::to_string(shared.bytes.size()) + " bytes of shared memory");
  return shared.bytes.data() + offset;
}

void Deferred::add(uint64_t key, std::function<void()> piece) {
  const auto before = work.find(key);
  if (random == nullptr || (before == work.end() && next_random(*random) % 4 == 0))
    piece();
  else
    work[key].push_back(std::move(piece));
}

void Deferred::finish(uint64_t key) {
  for (auto queue = work.find(key); queue != work.end(); queue = work.find(key)) {
    const auto piece = std::move(queue->second.front());
    queue->second.pop_front();
    if (queue->second.empty()) work.erase(queue);
    piece();
  }
}

bool Deferred::some() {
  if (work.empty()) return false;
  auto queue = work.begin();
  if (random) std::advance(queue, static_cast<std::ptrdiff_t>(next_random(*random) % work.size()));
  const auto piece = std::move(queue->second.front());
  queue->second.pop_front();
  if (queue->second.empty()) work.erase(queue);
  piece();
  return true;
}

void Deferred::all() {
  while (some()) {
  }
}

void launch(Module &module, const std::string &kernel, const uint32_t grid_size[3], const uint32_t block_size[3],
            size_t dynamic_shared, void *const *arguments, Attributes attributes) {
  const std::lock_guard<std::mutex> lock(launching);
  const Function &function = module.function(kernel);
  const auto refuse = [&](const std::string &why) { throw Error("launch of kernel " + kernel + ": " + why); };
  const uint32_t most_blocks[3] = {0x7fffffff, 65535, 65535}, most_threads[3] = {1024, 1024, 64};
  uint64_t threads = 1;
  for (int i = 0; i < 3; ++i) {
    if (grid_size[i] == 0 || grid_size[i] > most_blocks[i]) refuse("a grid of " + triple(grid_size) + " blocks");
    if (block_size[i] == 0 || block_size[i] > most_threads[i]) refuse("blocks of " + triple(block_size) + " threads");
    if (function.required[0] != 0 && block_size[i] != function.required[i])
      refuse("blocks of " + triple(block_size) + " threads, but .reqntid is " + triple(function.required));
    threads *= block_size[i];
  }
  if (threads > 1024 || threads > static_cast<uint64_t>(function.max_threads))
    refuse(std::to_string(threads) + " threads in a block, at most " + std::to_string(std::min(1024, function.max_threads)));
  if (function.shared + dynamic_shared > shared_limit)
    refuse(std::to_string(function.shared) + " + " + std::to_string(dynamic_shared) + " bytes of shared memory, of at most " +
           std::to_string(shared_limit));

  Grid grid{module, function, {}, {}, dynamic_shared, attributes};
  grid.random = seed;
  std::copy(grid_size, grid_size + 3, grid.size);
  std::copy(block_size, block_size + 3, grid.block_size);
  grid.parameters.resize(function.parameter_bytes);
  for (size_t i = 0; i < function.parameters.size(); ++i)
    std::memcpy(grid.parameters.data() + function.parameters[i].offset, arguments[i], function.parameters[i].size);
  grid.memory = accessible(grid);
  if (looks_for_races) grid.races = std::make_shared<RacesBetween>(grid);
  if (seed != 0) grid.deferred.random = &grid.random;
  ++total.launches;
  try {
    run_blocks(grid);
    // Whoever comes next waits for this grid only, which then may be over before the one ahead of it.
    if (attributes.programmatic && !grid.waited)
      throw Error("kernel " + kernel + ": a programmatic launch in which no thread executed griddepcontrol.wait");
  } catch (...) {
    total.instructions += grid.instructions;
    throw;
  }
  total.instructions += grid.instructions;
}

}  // namespace ptx
