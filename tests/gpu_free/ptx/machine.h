// A GPU that executes PTX on the host: what nvcc and Triton made of the kernels, instruction by instruction.
//
// csrc/cuda/host_execution.h runs the kernels' C++ source, and Triton's interpreter their Python: neither sees inline
// assembly, descriptors, register fragments, or what a compiler made of them. Here the compilers' own output runs, as the
// PTX manual defines it. parse.cpp reads a module and body.cpp a kernel, schedule.cpp runs its threads, and the instructions
// are in scalar.cpp (registers, memory, control), async.cpp (barriers and copies) and matrix.cpp (ldmatrix, mma.sync, wgmma).
// global.cpp, races.cpp and races_between.cpp look at what they access.
//
// Threads of a warp that are at the same instruction execute it together, those furthest behind first; a seed decides which
// warp goes on and for how long, and when asynchronous work is done between its issue and its wait. What a GPU would fault
// at, or leave undefined, is an Error that names kernel, line, block and thread: misaligned or out of bounds addresses,
// a .sync instruction that lanes of its mask never reach, a matrix read of bytes that no proxy fence followed, a deadlock.
#ifndef PTX_MACHINE_H
#define PTX_MACHINE_H

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

using Lanes = uint32_t;  // one bit per lane of a warp
using Error = std::runtime_error;

// ---- programs (parse.cpp, body.cpp) ----

struct Operand {
  enum Kind : uint8_t {
    nothing,  // "_"
    reg,      // slot
    number,   // bits: an immediate (floats as their bits, "1.0" as a double's), the address of a symbol
    special,  // slot: a Special
    memory,   // [base + bits]: items[0] is the base (a reg or a number); [base, {x, y}]: items[1] is the vector
    vector,   // {a, b, ...}, and a|b of setp, shfl, elect: items
    label,    // slot: index of an instruction; of brx, a vector of labels
  } kind = nothing;
  bool negated = false;  // "!%p1"
  uint8_t width = 0;     // of a reg: bits it was declared with, 1 for a predicate; of memory: of its base if that is a reg
  int slot = -1;
  uint64_t bits = 0;
  std::vector<Operand> items;
  std::string text;  // as written
};

enum Special : int {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  clock,
  globaltimer,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  lanemask_eq,
  dynamic_smem_size,
  total_smem_size,
  envreg1,
  envreg2,
  nwarpid,
  smid,
  nsmid,
  gridid,
  cluster_rank,
  cluster_blocks,
  cluster_ctaid,
  cluster_nctaid,  // clusters are single blocks
  specials
};  // add as needed

struct Warp;
struct Instruction;

// What became of the lanes that came to an instruction.
enum class Outcome : uint8_t {
  next,    // done: they go on behind it
  jumped,  // they were sent elsewhere: `pc` is set
  wait,    // nothing happened: they try again when something else in the grid has moved
  exited,
};
// Executes for `lanes`, those whose guard holds. Never called with no lanes.
using Execute = Outcome (*)(Warp &, const Instruction &, Lanes lanes);

struct Instruction {
  std::vector<std::string> words;  // "wgmma", "mma_async", "sync", ...; "shared::cta" is one word
  std::vector<Operand> operands;   // a call's or wgmma's flags are operands like others
  int guard = -1;                  // slot of the predicate, or -1
  bool guard_negated = false;
  bool quiet = false;          // changes nothing but registers: a loop of only such ones waits for others
  bool orders_blocks = false;  // a fence, an acquire or a release whose scope is more than the block
  int line = 0;                // of the module's text
  std::string text;
  Execute execute = nullptr;
  // What the decoder made of `words`, for speed: their meaning is the decoder's own.
  int detail[8] = {};
};

// Each fills `execute` and `detail` if the instruction is one of its file's; false if not.
bool decode_scalar(Instruction &);
bool decode_async(Instruction &);
bool decode_matrix(Instruction &);

struct Parameter {
  std::string name;
  size_t offset, size, align;
};
struct Function {
  std::string name;
  std::vector<Parameter> parameters;
  size_t parameter_bytes = 0;
  std::vector<Instruction> code;  // decoded; falls off its end like a `ret`
  bool orders_blocks = false;     // some instruction of it does
  int slots = 0;                  // registers, predicates among them
  size_t shared = 0;              // bytes of static shared memory, laid out before dynamic memory
  size_t local = 0;
  int max_threads = 1024;     // .maxntid or .reqntid
  uint32_t required[3] = {};  // .reqntid
};
// Bytes of global memory.
struct Range {
  uint64_t begin, end;
};
struct Module {
  std::string text, target;                   // "sm_90a"
  std::map<std::string, size_t> where;        // kernels: where each starts in `text`
  std::map<std::string, Function> functions;  // parsed on demand: nearest's PTX has 64000 lines
  std::map<std::string, uint64_t> globals;    // .global and .const symbols: addresses in `memory`
  std::deque<std::vector<uint64_t>> memory;
  std::vector<Range> variables;  // where those of `globals` are
  struct SharedVariable {
    size_t bytes, align;
    bool dynamic;
  };
  std::map<std::string, SharedVariable> shared;  // those declared outside of kernels

  explicit Module(std::string text);
  const Function &function(const std::string &name);
  int capability() const { return std::stoi(target.substr(3)); }  // 90
};

// ---- execution (machine.cpp, schedule.cpp) ----

// Generic addresses: global memory is the host's own; the others are windows that no host address is in.
constexpr uint64_t shared_window = 0x7000'0000'0000'0000, local_window = 0x7100'0000'0000'0000,
                   param_window = 0x7200'0000'0000'0000, window_mask = 0xff00'0000'0000'0000;

struct Grid;
struct Block;

struct Warp {
  Block &block;
  int index;       // in its block
  Lanes live = 0;  // lanes that exist and have not exited
  int pc[32] = {};
  std::vector<uint64_t> registers = {};  // [slot * 32 + lane]; narrow values are zero-extended, predicates are 0 or 1
  // The scheduler's: lanes that tried and have to wait; `moved` of the grid when all of them did.
  Lanes waiting = 0;
  uint64_t stalled = 0;
  Lanes early = 0;           // of a programmatic launch, those that have not executed griddepcontrol.wait
  Lanes watched = 0;         // whose accesses of global memory check_global() has to see
  uint32_t ticket[32] = {};  // free use of an instruction that waits: what the lane did on its first try; 0 otherwise

  uint64_t &at(int slot, int lane) { return registers[static_cast<size_t>(slot) * 32 + static_cast<size_t>(lane)]; }
  // Value of a reg, number or special.
  uint64_t get(const Operand &o, int lane) const {
    if (o.kind == Operand::reg) return registers[static_cast<size_t>(o.slot) * 32 + static_cast<size_t>(lane)];
    return o.kind == Operand::number ? o.bits : special(o, lane);
  }
  void set(const Operand &o, int lane, uint64_t bits) {  // ignores "_"
    if (o.kind == Operand::reg) at(o.slot, lane) = bits;
  }
  uint64_t special(const Operand &o, int lane) const;
  // base + offset of a memory operand, as its space counts (shared: from the start of the block's).
  uint64_t address(const Operand &o, int lane) const {
    const uint64_t address = get(o.items[0], lane) + o.bits;
    return o.width == 32 ? static_cast<uint32_t>(address) : address;
  }
  int thread(int lane) const { return index * 32 + lane; }
  // An Error that names this instruction and lane (-1: all of the warp).
  [[noreturn]] void fail(const Instruction &, int lane, const std::string &why) const;
};

// Bytes of a block's shared memory, checked: alignment to `bytes`, bounds. Offsets may be generic addresses in the window.
struct Shared {
  std::vector<unsigned char> bytes;  // 0xff at the start of a block
  std::vector<uint8_t> unfenced;     // per 16 bytes: written by ordinary stores, no fence.proxy.async since
};

struct Block {
  Grid &grid;
  uint32_t number = 0;  // in its grid
  uint32_t index[3] = {};
  std::vector<std::unique_ptr<Warp>> warps = {};
  Shared shared = {};
  std::vector<unsigned char> local = {};  // function.local bytes per thread
  int threads = 0, exited = 0;

  // `bytes` bytes at an offset of shared memory, for reading or writing by an instruction of `warp`.
  unsigned char *shared_at(const Warp &, const Instruction &, int lane, uint64_t offset, size_t bytes, size_t align);

  // State that scalar_barrier.cpp, async.cpp and matrix.cpp keep per block.
  std::shared_ptr<struct BarrierState> barriers = {};
  std::shared_ptr<struct AsyncState> async = {};
  std::shared_ptr<struct MatrixState> matrix = {};
  std::shared_ptr<class Races> races = {};  // null: not looked for
};

// Asynchronous work of a grid: done at a moment that the seed chooses, at the latest when nothing else can move, or when
// finish(key) asks for it. Work of one key is done in the order of its issue.
class Deferred {
 public:
  void add(uint64_t key, std::function<void()> work);
  void finish(uint64_t key);
  bool some();  // does one piece of the work, chosen by the seed; false if there is none
  void all();

  std::map<uint64_t, std::deque<std::function<void()>>> work = {};
  uint64_t *random = nullptr;  // of the grid; null: at once
};

// How a kernel is launched, besides its sizes.
struct Attributes {
  bool cooperative = false;  // all blocks are resident
  bool programmatic =
      false;  // starts before the launch ahead of it has ended: what that wrote is there after griddepcontrol.wait
};

struct Grid {
  const Module &module;
  const Function &function;
  uint32_t size[3], block_size[3];
  size_t dynamic_shared;
  Attributes attributes;
  std::vector<unsigned char> parameters = {};
  std::vector<std::unique_ptr<Block>> blocks = {};              // those that are resident
  std::vector<uint64_t> workspace = std::vector<uint64_t>(64);  // of a cooperative grid, for its barrier: envreg1 and 2
  std::vector<Range> memory = {};                               // what it may access, in order; empty: not checked
  Deferred deferred = {};
  uint64_t random = 0;  // state of the generator: next_random(random)
  // True while a wait that gives up after a time (mbarrier.try_wait) must do so, because nothing else moves. After
  // `patience` such moments in a row the grid is deadlocked.
  bool impatient = false;
  uint64_t instructions = 0;                       // executed, of all warps
  bool waited = false;                             // some thread has executed griddepcontrol.wait
  std::shared_ptr<class RacesBetween> races = {};  // null: none are looked for, in its blocks neither
};

// An Error if a lane may not access these bytes of global memory, or not yet (global.cpp). Constants may be read at any time.
void check_global(Warp &, const Instruction &, int lane, uint64_t address, size_t bytes, bool constant = false);
// Of a new warp, or after griddepcontrol.wait.
void watch(Warp &);
// What a grid may access: the ranges that its thread has set, and what belongs to the launch itself.
std::vector<Range> accessible(const Grid &);

// "(x,y,z)" of a thread by its number in its block, of a block by its number.
std::string thread_name(const Grid &, uint32_t thread);
std::string block_name(const Grid &, uint32_t block);

uint64_t next_random(uint64_t &state);
// Runs the grid's blocks to their ends (schedule.cpp).
void run_blocks(Grid &);

// One launch. `arguments` points at each parameter, as cuLaunchKernel's. Runs to the end; throws Error.
void launch(Module &, const std::string &kernel, const uint32_t grid[3], const uint32_t block[3], size_t dynamic_shared,
            void *const *arguments, Attributes);

// For all launches from now on. 0: threads in order, asynchronous work at once; others: a mixture.
void set_seed(uint64_t);
// Whether to look for races (races.h, races_between.h): costs time.
void set_races(bool);
// Bytes of shared memory that a block may have.
void set_shared_limit(size_t);
// What launches of this thread may access of global memory besides their module's variables; none: everything.
void set_global(std::vector<Range>);
// Launches and warp instructions since the start.
struct Counts {
  uint64_t launches, instructions;
};
Counts counts();

}  // namespace ptx

// ---- for Python, by ctypes (api.cpp) ----
extern "C" {
__attribute__((visibility("default"))) void *ptx_load(const char *text);  // null: ptx_error()
__attribute__((visibility("default"))) void ptx_unload(void *module);
// Names of kernels, a line each; the sizes of a kernel's parameters in bytes, separated by spaces. Valid until the next call.
__attribute__((visibility("default"))) const char *ptx_kernels(void *module);
__attribute__((visibility("default"))) const char *ptx_parameters(void *module, const char *kernel);
// 0, or 1: ptx_error() says why. Attributes: 1 cooperative, 2 programmatic.
__attribute__((visibility("default"))) int ptx_launch(void *module, const char *kernel, const uint32_t *grid,
                                                      const uint32_t *block, uint64_t dynamic_shared, void *const *arguments,
                                                      int attributes);
__attribute__((visibility("default"))) const char *ptx_error(void);
__attribute__((visibility("default"))) void ptx_seed(uint64_t);
__attribute__((visibility("default"))) void ptx_races(int);
__attribute__((visibility("default"))) void ptx_shared_limit(uint64_t bytes);
// Pairs: where a range of global memory begins and where it ends, `count` pairs.
__attribute__((visibility("default"))) void ptx_global(const uint64_t *ranges, uint64_t count);
__attribute__((visibility("default"))) uint64_t ptx_launches(void);
__attribute__((visibility("default"))) uint64_t ptx_instructions(void);
}

#endif
