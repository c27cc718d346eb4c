// Does csrc/cuda/portable.cuh do what CUDA does, and does its host half notice what it should? Prints a line per failure.
//
// Built by csrc/CMakeLists.txt for the host (target vqk_portable_selftest), run by test_cuda_host.py with several seeds.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/portable.cuh"

namespace {

using vqk::Launch;

int failures = 0;
void expect(bool ok, const char *what) {
  if (ok) return;
  ++failures;
  std::printf("failed: %s\n", what);
}

struct Reversed {
  int value[257];
};
// Thread i reads what thread n - 1 - i wrote; without the barrier, what was there before.
template <bool with_barrier>
__global__ void reverse(int *out) {
  vqk::start_kernel();
  Reversed &shared = vqk::shared_memory<Reversed>();
  for (int turn = 0; turn < 3; ++turn) {
    shared.value[threadIdx.x] = static_cast<int>(threadIdx.x) + 1000 * turn;
    if (with_barrier) __syncthreads();
    out[turn * 257 + static_cast<int>(threadIdx.x)] = shared.value[blockDim.x - 1 - threadIdx.x];
    if (with_barrier) __syncthreads();
  }
}
bool reversed(const std::vector<int> &out) {
  for (int turn = 0; turn < 3; ++turn)
    for (int i = 0; i < 257; ++i)
      if (out[static_cast<size_t>(turn * 257 + i)] != 256 - i + 1000 * turn) return false;
  return true;
}

__global__ void shuffles(int *out) {
  vqk::start_kernel();
  const int lane = vqk::lane(), value = 10 * lane;
  int sum = value;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  bool ok = sum == 4960;
  ok &= __shfl_sync(~0u, value, 5) == 50;
  ok &= __shfl_sync(~0u, value, 3, 8) == 10 * (lane / 8 * 8 + 3);
  ok &= __shfl_down_sync(~0u, value, 4) == (lane + 4 < 32 ? value + 40 : value);
  ok &= __shfl_up_sync(~0u, value, 1) == (lane > 0 ? value - 10 : value);
  ok &= __ballot_sync(~0u, lane % 3 == 0) == 0x49249249u;
  ok &= __any_sync(~0u, lane == 9) && !__all_sync(~0u, lane == 9);
  ok &= __reduce_max_sync(~0u, static_cast<unsigned>(lane)) == 31u && __reduce_add_sync(~0u, 1) == 32;
  ok &= __match_any_sync(~0u, lane % 2) == (lane % 2 ? 0xaaaaaaaau : 0x55555555u);
  // Two halves of a warp at different calls.
  if (lane < 16) {
    for (int i = 0; i < 3; ++i) ok &= __shfl_xor_sync(0xffffu, value, 1) == 10 * (lane ^ 1);
  } else {
    ok &= __reduce_min_sync(0xffff0000u, value) == 160;
  }
  __syncwarp();
  atomicAdd(out, ok ? 1 : 0);
}

struct Pipeline {
  float row[2][64];
  vqk::Mbarrier full[2], empty[2];
  float copied[64];
};
// One producer thread, 64 consumers. A consumer that does not hand back its stage before it is done is right; a producer
// that does not wait for it (`careful` false) overwrites a row that is still being read.
template <bool careful>
__global__ void pipeline(const float *x, int rows, float *out) {
  vqk::start_kernel();
  Pipeline &shared = vqk::shared_memory<Pipeline>();
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(64);
    }
  vqk::fence_mbarrier_init();
  __syncthreads();
  if (threadIdx.x >= 64) {
    if (threadIdx.x == 64)
      for (int r = 0; r < rows; ++r) {
        const int stage = r % 2;
        if (careful && r >= 2) shared.empty[stage].wait(static_cast<uint32_t>(r / 2 - 1) % 2);
        shared.full[stage].arrive_expect(64 * sizeof(float));
        vqk::bulk_copy(shared.row[stage], x + r * 64, 64 * sizeof(float), shared.full[stage]);
      }
    return;
  }
  for (int r = 0; r < rows; ++r) {
    const int stage = r % 2;
    shared.full[stage].wait(static_cast<uint32_t>(r / 2) % 2);
    const float value = shared.row[stage][threadIdx.x];
    shared.empty[stage].arrive();
    shared.copied[threadIdx.x] = value;
    vqk::barrier_sync(1, 64);
    out[r * 64 + static_cast<int>(threadIdx.x)] = shared.copied[63 - threadIdx.x];
    vqk::barrier_sync(1, 64);
  }
}

struct Stages {
  float4 value[3][32];
};
// cp.async in three stages; `wait` 1 is right, 2 reads a copy that may not have happened.
template <int wait>
__global__ void stages(const float4 *x, int rows, float *out) {
  vqk::start_kernel();
  Stages &shared = vqk::shared_memory<Stages>();
  const int i = static_cast<int>(threadIdx.x);
  for (int r = 0; r < 2; ++r) {
    vqk::copy_async<16>(&shared.value[r][i], x + r * 32 + i, r < rows);
    vqk::copy_commit();
  }
  for (int r = 0; r < rows; ++r) {
    vqk::copy_wait<wait>();
    __syncthreads();
    const float4 v = shared.value[r % 3][31 - i];
    out[r * 32 + i] = v.x + v.y + v.z + v.w;
    const int next = r + 2;
    if (next < rows) vqk::copy_async<16>(&shared.value[next % 3][i], x + next * 32 + i);
    vqk::copy_commit();
  }
}

__global__ void divergent() {
  vqk::start_kernel();
  if (threadIdx.x < 32) __syncthreads();
}

// Without start_kernel(): it would not wait for the kernel before it.
__global__ void hasty() {}

__global__ void arithmetic(const double *x, double *out) {
  vqk::start_kernel();
  out[0] = __dadd_rn(__dmul_rn(x[0], x[1]), x[2]);
  out[1] = vqk::half_to_float(vqk::float_to_half(1.0f / 3));
}

// Blocks pass numbers on to their neighbours, in turns. Without the barrier a block that is ahead reads what is not there yet;
// with a thread that leaves (`all` false), nobody can go on.
template <bool with_barrier, bool all>
__global__ void pass_on(int *turns, int count) {
  vqk::start_kernel();
  const int blocks = static_cast<int>(gridDim.x), self = static_cast<int>(blockIdx.x);
  if (!all && self == 1 && threadIdx.x == 3) return;
  for (int turn = 1; turn < count; ++turn) {
    if (threadIdx.x == 0) turns[turn * blocks + self] = turns[(turn - 1) * blocks + (self + 1) % blocks] + 1;
    if (with_barrier) vqk::grid_barrier();
    __syncthreads();
  }
}

bool fails_with(int32_t status, const char *text) {
  return status == VQK_INTERNAL && std::string(vqk_last_error()).find(text) != std::string::npos;
}

int run(uint64_t seed) {
  vqk::host::set_seed(seed);
  const int before = failures;
  std::vector<int> out(3 * 257);
  expect(vqk::launch("reverse", reverse<true>, {1, 257, sizeof(Reversed), nullptr}, out.data()) == VQK_OK, "reverse runs");
  expect(reversed(out), "a barrier orders writes and reads");
  out.assign(out.size(), 0);
  vqk::launch("reverse", reverse<false>, {1, 257, sizeof(Reversed), nullptr}, out.data());
  expect(!reversed(out), "a missing barrier shows up");

  int ok = 0;
  expect(vqk::launch("shuffles", shuffles, {3, 96, 0, nullptr}, &ok) == VQK_OK && ok == 288, "shuffles and votes");

  std::vector<float> x(7 * 64), y(7 * 64);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  const auto copied = [&] {
    for (size_t i = 0; i < y.size(); ++i)
      if (y[i] != x[i / 64 * 64 + 63 - i % 64]) return false;
    return true;
  };
  const Launch one{1, 96, sizeof(Pipeline), nullptr};
  expect(vqk::launch("pipeline", pipeline<true>, one, x.data(), 7, y.data()) == VQK_OK && copied(), "producer and consumers");
  y.assign(y.size(), 0);
  const int32_t status = vqk::launch("pipeline", pipeline<false>, one, x.data(), 7, y.data());
  expect(status != VQK_OK || !copied(), "a stage that is filled too early shows up");

  std::vector<float4> v(5 * 32);
  for (size_t i = 0; i < v.size(); ++i) v[i] = make_float4(static_cast<float>(i), 1, 2, 3);
  std::vector<float> sums(5 * 32);
  const auto summed = [&] {
    for (size_t i = 0; i < sums.size(); ++i)
      if (sums[i] != static_cast<float>(i / 32 * 32 + 31 - i % 32 + 6)) return false;
    return true;
  };
  const Launch staged{1, 32, sizeof(Stages), nullptr};
  expect(vqk::launch("stages", stages<1>, staged, v.data(), 5, sums.data()) == VQK_OK && summed(), "cp.async");
  vqk::launch("stages", stages<2>, staged, v.data(), 5, sums.data());
  expect(!summed(), "a missing wait for cp.async shows up");

  std::vector<int> turns(40 * 5);
  const auto passed = [&] { return std::count(turns.end() - 5, turns.end(), 39) == 5; };
  const Launch jointly{5, 64, 0, nullptr, true};
  expect(vqk::launch("pass_on", pass_on<true, true>, jointly, turns.data(), 40) == VQK_OK && passed(), "a grid's barrier");
  turns.assign(turns.size(), 0);
  vqk::launch("pass_on", pass_on<false, true>, jointly, turns.data(), 40);
  expect(!passed(), "a grid's missing barrier shows up");
  expect(fails_with(vqk::launch("pass_on", pass_on<true, false>, jointly, turns.data(), 40), "in grid_barrier"),
         "a block that does not come is noticed");
  expect(fails_with(vqk::launch("pass_on", pass_on<true, true>, {5, 64, 0, nullptr}, turns.data(), 40), "is not cooperative"),
         "a grid's barrier wants a cooperative launch");
  turns.assign(turns.size(), 0);
  expect(vqk::launch("pass_on", pass_on<true, true>, jointly, turns.data(), 40) == VQK_OK && passed(), "works after that");

  expect(fails_with(vqk::launch("divergent", divergent, {2, 64, 0, nullptr}), "nobody can go on: 32 threads wait"), "deadlock");
  expect(fails_with(vqk::launch("reverse", reverse<true>, {1, 257, 8, nullptr}, out.data()), "the launch gave 8 bytes"),
         "too little shared memory");
  expect(fails_with(vqk::launch("hasty", hasty, {2, 64, 0, nullptr}), "no start_kernel()"), "no wait for the kernel before");
  expect(vqk::launch("shuffles", shuffles, {3, 96, 0, nullptr}, &ok) == VQK_OK && ok == 576, "works after failures");

  const double values[] = {1 + 1.0 / (1 << 30), 1 - 1.0 / (1 << 30), -1};
  double results[2];
  vqk::launch("arithmetic", arithmetic, {1, 1, 0, nullptr}, static_cast<const double *>(values), results);
  expect(results[0] == 0 && results[1] == 0.333251953125, "no contraction; halves");
  return failures - before;
}

}  // namespace

int main(int count, char **arguments) {
  for (uint64_t seed = 0; seed < (count > 1 ? std::stoull(arguments[1]) : 8); ++seed)
    if (run(seed)) std::printf("with seed %llu\n", static_cast<unsigned long long>(seed));
  return failures != 0;
}
