// One block of a launch on the host: a fibre per thread, switched by hand, in an order that a seed decides.
//
// Included by host_execution.cpp only. A fibre runs until it has to wait; who goes on next is the seed's choice, and so is
// when the copy engine works. When nobody can go on, the block says who waits for what.
#ifndef VQK_CUDA_HOST_EXECUTION_BLOCK_H
#define VQK_CUDA_HOST_EXECUTION_BLOCK_H

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/portable.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define VQK_ASAN 1
#endif

#if defined(__x86_64__) && !defined(_WIN32)
// Saves what the ABI wants kept and swaps stacks: a hundred times faster than swapcontext, which asks the kernel.
extern "C" void vqk_fibre_switch(void **from, void *to);
asm(R"(
.text
.hidden vqk_fibre_switch
.globl vqk_fibre_switch
.type vqk_fibre_switch, @function
vqk_fibre_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vqk_fibre_switch, .-vqk_fibre_switch
)");
#define VQK_SWITCH_BY_HAND 1
#else
#include <ucontext.h>
#endif

namespace vqk {
namespace host {
namespace {

constexpr size_t stack_bytes = 256 * 1024;  // sanitizers make frames large
constexpr int queues = 2;

uint64_t seed = 0;

struct Fibre {
#if defined(VQK_SWITCH_BY_HAND)
  void *stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void *fake_stack = nullptr;
  uint3 thread{};
  bool started = false, done = false;
  const void *key = nullptr;  // what it waits for, and as whom
  const char *what = nullptr;
  std::vector<std::vector<std::function<void()>>> groups[queues];  // the last one is open
};

struct Named {
  int expected = 0, arrived = 0;
};

// One collective call of the lanes of a mask. Two buffers: a lane that is ahead by one call fills the other one.
struct Exchange {
  uint32_t mask = 0, arrived = 0;
  int turn = 0;
  size_t bytes = 0;
  const char *what = nullptr;
  unsigned char data[2][32 * lane_bytes];
};

class Block;
thread_local Block *running = nullptr;

class Block {
 public:
  Block(dim3 threads, size_t shared, const std::function<void()> &body)
      : threads_(threads), shared_bytes_(shared), body_(body), fibres_(threads.x * threads.y * threads.z) {
    stacks_.reset(new char[fibres_.size() * stack_bytes]);
    warps_.resize((fibres_.size() + 31) / 32);
  }

  ~Block() { release_stacks(); }

  // Every thread of one block at its first instruction.
  void start(uint3 block, std::mt19937_64 &random) {
    random_ = &random;
    block_ = block;
    policy_ = seed == 0 ? 0 : static_cast<int>(random() % 4);
    release_stacks();
    // A multiple of 1024 bytes in, as on the device; bytes past the end are ASan's redzone.
    shared_storage_.reset(new unsigned char[shared_bytes_ + 1024]);
    shared_ = shared_storage_.get();
    const size_t skip = (1024 - reinterpret_cast<uintptr_t>(shared_) % 1024) % 1024;
    shared_ += skip;
    std::memset(shared_, 0xff, shared_bytes_);
#if defined(VQK_ASAN)
    __asan_poison_memory_region(shared_ + shared_bytes_, 1024 - skip);
    guard_ = {shared_ + shared_bytes_, 1024 - skip};
#endif
    for (Named &barrier : named_) barrier = {};
    for (auto &exchanges : warps_) exchanges.clear();
    engine_.clear();
    failed_ = false;
    live_ = fibres_.size();
    runnable_.clear();
    starved_.assign(warps_.size(), 0);
    for (auto &s : starved_) s = random();
    for (size_t i = 0; i < fibres_.size(); ++i) {
      const uint32_t id = static_cast<uint32_t>(i);
      const uint3 thread{id % threads_.x, id / threads_.x % threads_.y, id / threads_.x / threads_.y};
      fibres_[i] = Fibre();
      fibres_[i].thread = thread;
      prepare(i);
      runnable_.push_back(i);
    }
  }

  bool done() const { return live_ == 0 && engine_.empty(); }
  bool stuck() const { return runnable_.empty() && engine_.empty(); }
  bool failed() const { return failed_; }

  // One fibre up to its next wait, or one piece of the engine's work.
  void advance() {
    ids.block = block_;
    ids.threads = threads_;
    running = this;
    step();
    running = nullptr;
  }

  void finish() {
#if defined(VQK_ASAN)
    __asan_unpoison_memory_region(guard_.first, guard_.second);
#endif
  }

  // Runs one block; false if it failed, with the reason in `message`.
  bool run(uint3 block, std::mt19937_64 &random) {
    start(block, random);
    while (!done() && !failed_) {
      if (stuck())
        report_deadlock();
      else
        advance();
    }
    finish();
    return !failed_;
  }

  void report_deadlock() {
    size_t waiting = 0, exited = 0, first = fibres_.size();
    for (size_t i = 0; i < fibres_.size(); ++i) {
      exited += fibres_[i].done;
      waiting += !fibres_[i].done;
      if (!fibres_[i].done) first = std::min(first, i);
    }
    const Fibre &f = fibres_[first];
    std::snprintf(message_, sizeof message_,
                  "block (%u, %u, %u): nobody can go on: %zu threads wait, the first, (%u, %u, %u), in %s; %zu have returned",
                  block_.x, block_.y, block_.z, waiting, f.thread.x, f.thread.y, f.thread.z, f.what, exited);
    failed_ = true;
  }

  const char *message() const { return message_; }
  unsigned char *shared(size_t bytes) {
    if (bytes > shared_bytes_) error("shared_memory: the launch gave %zu bytes, the kernel takes %zu", shared_bytes_, bytes);
    return shared_;
  }
  Fibre &fibre() { return fibres_[current_]; }

  [[noreturn]] void stop(const char *format, va_list arguments) {
    const int at = std::snprintf(message_, sizeof message_, "block (%u, %u, %u), thread (%u, %u, %u): ", ids.block.x, ids.block.y,
                                 ids.block.z, ids.thread.x, ids.thread.y, ids.thread.z);
    std::vsnprintf(message_ + at, sizeof message_ - static_cast<size_t>(at), format, arguments);
    failed_ = true;
    leave(false);
    std::abort();  // a stopped fibre is never resumed
  }

  void sleep(const void *key, const char *what) {
    fibre().key = key;
    fibre().what = what;
    leave(false);
  }
  void wake(const void *key) {
    for (size_t i = 0; i < fibres_.size(); ++i)
      if (fibres_[i].key == key) {  // whoever runs waits for nothing
        fibres_[i].key = nullptr;
        runnable_.push_back(i);
      }
  }

  void barrier(int id, int threads, bool wait, const char *what) {
    if (id < 0 || id > 15) error("%s(%d): expected 0 to 15", what, id);
    const int expected = threads == 0 ? static_cast<int>(fibres_.size()) : threads;
    if (threads % 32 != 0) error("%s(%d, %d): expected a multiple of 32 threads", what, id, threads);
    Named &barrier = named_[id];
    if (barrier.arrived > 0 && barrier.expected != expected)
      error("%s(%d): %d threads here, %d where others arrived", what, id, expected, barrier.expected);
    barrier.expected = expected;
    if (++barrier.arrived == expected) {
      barrier.arrived = 0;
      wake(&barrier);
    } else if (wait) {
      sleep(&barrier, what);
    }
  }

  const unsigned char *exchange(uint32_t mask, const char *what, const void *value, size_t bytes) {
    const uint32_t lane = static_cast<uint32_t>(current_ % 32);
    if (!(mask >> lane & 1)) error("%s: lane %u calls with mask %#x, which it is not in", what, lane, mask);
    std::unique_ptr<Exchange> *found = nullptr;
    auto &all = warps_[current_ / 32];
    for (auto &e : all)
      if (e->mask == mask) found = &e;
    if (found == nullptr) {
      all.emplace_back(new Exchange);
      found = &all.back();
      (*found)->mask = mask;
    }
    Exchange &e = **found;
    if (e.arrived != 0 && (std::strcmp(e.what, what) != 0 || e.bytes != bytes))
      error("%s of %zu bytes, while lanes of its mask %#x call %s of %zu bytes", what, bytes, mask, e.what, e.bytes);
    e.what = what;
    e.bytes = bytes;
    unsigned char *data = e.data[e.turn];
    std::memcpy(data + lane * lane_bytes, value, bytes);
    e.arrived |= 1u << lane;
    if (e.arrived == mask) {
      e.arrived = 0;
      e.turn ^= 1;
      wake(&e);
    } else {
      sleep(&e, what);
    }
    return data;
  }

  void engine(std::function<void()> work) { engine_.push_back(std::move(work)); }
  bool chance() { return seed != 0 && (*random_)() % 2 == 0; }

 private:
  // Entry of every fibre.
  static void enter() {
    Block *block = running;
    block->arrived_on(nullptr);
    block->body_();
    if (!block->fibre().started) error("no start_kernel()");
    for (int queue = 0; queue < queues; ++queue) {
      if (block->fibre().groups[queue].empty()) continue;
      commit(queue);
      host::wait(queue, 0);
    }
    block->fibre().done = true;
    --block->live_;
    block->leave(true);
  }

  void prepare(size_t i) {
    char *stack = stacks_.get() + i * stack_bytes;
#if defined(VQK_SWITCH_BY_HAND)
    // As if enter() had been called from address 0: aligned to 16 before the call's push.
    void **top = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(stack) + stack_bytes - 64) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(&enter);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fibres_[i].stack_pointer = top;
#else
    getcontext(&fibres_[i].context);
    fibres_[i].context.uc_stack.ss_sp = stack;
    fibres_[i].context.uc_stack.ss_size = stack_bytes;
    fibres_[i].context.uc_link = nullptr;
    makecontext(&fibres_[i].context, &enter, 0);
#endif
  }

  // The order of execution: a fibre, or one piece of the engine's work.
  void step() {
    std::mt19937_64 &random = *random_;
    if (!engine_.empty() && (runnable_.empty() || policy_ == 0 || random() % 64 == 0)) {
      const size_t at = policy_ == 0 ? 0 : random() % engine_.size();
      const auto work = std::move(engine_[at]);
      engine_.erase(engine_.begin() + static_cast<std::ptrdiff_t>(at));
      current_ = fibres_.size();  // nobody
      work();
      return;
    }
    size_t at = 0;
    switch (policy_) {
      case 0: break;                                                                           // first come, first served
      case 1: at = random() % runnable_.size(); break;                                         // anyone
      case 2: at = random() % 16 ? runnable_.size() - 1 : random() % runnable_.size(); break;  // runs ahead
      default:                                                                                 // some warps starve
        for (size_t i = 1; i < runnable_.size(); ++i)
          if (starved_[runnable_[i] / 32] < starved_[runnable_[at] / 32]) at = i;
    }
    const size_t next = runnable_[at];
    runnable_.erase(runnable_.begin() + static_cast<std::ptrdiff_t>(at));
    resume(next);
  }

  void resume(size_t i) {
    current_ = i;
    ids.thread = fibres_[i].thread;
#if defined(VQK_ASAN)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stacks_.get() + i * stack_bytes, stack_bytes);
#endif
#if defined(VQK_SWITCH_BY_HAND)
    vqk_fibre_switch(&scheduler_, fibres_[i].stack_pointer);
#else
    swapcontext(&scheduler_, &fibres_[i].context);
#endif
#if defined(VQK_ASAN)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  }

  // From a fibre to the scheduler.
  void leave([[maybe_unused]] bool for_good) {
    Fibre &self = fibre();
#if defined(VQK_ASAN)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
#if defined(VQK_SWITCH_BY_HAND)
    vqk_fibre_switch(&self.stack_pointer, scheduler_);
#else
    swapcontext(&self.context, &scheduler_);
#endif
    arrived_on(self.fake_stack);
  }

  void arrived_on([[maybe_unused]] void *fake_stack) {
#if defined(VQK_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  // Frames of a block that failed were never left: their redzones would be found by the next one.
  void release_stacks() {
#if defined(VQK_ASAN)
    __asan_unpoison_memory_region(stacks_.get(), fibres_.size() * stack_bytes);
#endif
  }

  dim3 threads_;
  uint3 block_{};
  size_t shared_bytes_;
  const std::function<void()> &body_;
  std::vector<Fibre> fibres_;
  std::unique_ptr<char[]> stacks_;
  std::unique_ptr<unsigned char[]> shared_storage_;
  unsigned char *shared_ = nullptr;
  std::pair<void *, size_t> guard_{};
  Named named_[16];
  std::vector<std::vector<std::unique_ptr<Exchange>>> warps_;
  std::vector<std::function<void()>> engine_;
  std::vector<size_t> runnable_;
  std::vector<uint64_t> starved_;
  std::mt19937_64 *random_ = nullptr;
  int policy_ = 0;
  size_t current_ = 0, live_ = 0;
  bool failed_ = false;
  char message_[384] = {};
  void *scheduler_fake_stack_ = nullptr;
  const void *scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#if defined(VQK_SWITCH_BY_HAND)
  void *scheduler_ = nullptr;
#else
  ucontext_t scheduler_;
#endif
};

}  // namespace
}  // namespace host
}  // namespace vqk

#endif
