// Prints, as JSON, what this machine's vector units reach on all threads: the ceilings that speeds are compared with.
// Built and run by benchmarks/peak.py. Arguments: threads, seconds per measurement.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Twelve independent accumulators hide the latency of two 4-cycle pipes. One asm statement per instruction, on named
// variables: the compiler can neither drop the work nor keep the accumulators in memory.
constexpr int kLoops = 2000;

// clang-format off
#define STEP(instruction, i) asm volatile(instruction " %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y))
#define CHAINS(vector, zero, instruction)                                                                     \
  vector x = zero, y = zero, a0 = zero, a1 = zero, a2 = zero, a3 = zero, a4 = zero, a5 = zero;                \
  vector a6 = zero, a7 = zero, a8 = zero, a9 = zero, a10 = zero, a11 = zero;                                  \
  for (int i = 0; i < kLoops; ++i) {                                                                          \
    STEP(instruction, 0); STEP(instruction, 1); STEP(instruction, 2); STEP(instruction, 3);                   \
    STEP(instruction, 4); STEP(instruction, 5); STEP(instruction, 6); STEP(instruction, 7);                   \
    STEP(instruction, 8); STEP(instruction, 9); STEP(instruction, 10); STEP(instruction, 11);                 \
  }
// clang-format on

__attribute__((target("avx2,fma"))) double fma_avx2() {
  CHAINS(__m256, _mm256_setzero_ps(), "vfmadd231ps")
  return 12.0 * kLoops * 2 * 8;
}

// Products and sums of int16 pairs, twice the products of an FMA: vpmaddwd, then vpaddd, which may take a third port.
#undef STEP
#define STEP(instruction, i) \
  asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(a##i), "=&v"(product) : "v"(x), "v"(y))
__attribute__((target("avx2"))) double dot_avx2int16() {
  __m256i product;
  CHAINS(__m256i, _mm256_setzero_si256(), "")
  return 12.0 * kLoops * 4 * 8;
}
#undef STEP
#define STEP(instruction, i) asm volatile(instruction " %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y))

__attribute__((target("avx512f"))) double fma_avx512() {
  CHAINS(__m512, _mm512_setzero_ps(), "vfmadd231ps")
  return 12.0 * kLoops * 2 * 16;
}

// Elements of a running maximum: the least that an argmax does per (row, code) pair.
#undef STEP
#define STEP(instruction, i) asm volatile(instruction " %1, %0, %0" : "+v"(a##i) : "v"(x), "v"(y))
__attribute__((target("avx512f"))) double max_avx512() {
  CHAINS(__m512, _mm512_setzero_ps(), "vmaxps")
  return 12.0 * kLoops * 16;
}
#undef STEP
#define STEP(instruction, i) asm volatile(instruction " %2, %1, %0" : "+v"(a##i) : "v"(x), "v"(y))

__attribute__((target("avx512f,avx512bf16"))) double dot_avx512bf16() {
  CHAINS(__m512, _mm512_setzero_ps(), "vdpbf16ps")
  return 12.0 * kLoops * 4 * 16;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Four tiles of 16 x 16 accumulators, two of rows, two of codes: the shape of a real kernel, without its loads.
__attribute__((target("amx-tile,amx-bf16"))) double amx_bf16() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.bytes_per_row[i] = 64;
    config.rows[i] = 16;
  }
  // GCC 12 tells the optimiser that ldtilecfg reads 8 bytes of its 64: without this the rest is never stored.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int i = 0; i < kLoops; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * kLoops * 2 * 16 * 16 * 32;
}

bool amx_granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Work per second of all threads together, best of five windows.
template <class Body>
double rate(int threads, double seconds, Body body) {
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::atomic<int> ready{0};
    std::vector<double> work(threads), elapsed(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        ++ready;
        while (ready < threads) std::this_thread::yield();
        const double start = now();
        double done = 0;
        do done += body(t);
        while (now() - start < seconds);
        work[t] = done;
        elapsed[t] = now() - start;
      });
    for (auto &thread : pool) thread.join();
    double total = 0;
    for (int t = 0; t < threads; ++t) total += work[t] / elapsed[t];
    best = std::max(best, total);
  }
  return best;
}

}  // namespace

int main(int argc, char **argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0.05;
  std::string out = "{";
  const auto print = [&](const char *name, double value) {
    char text[96];
    std::snprintf(text, sizeof text, "%s\"%s\": %.4g", out.size() > 1 ? ", " : "", name, value);
    out += text;
  };
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    print("avx2", rate(threads, seconds, [](int) { return fma_avx2(); }));
  if (__builtin_cpu_supports("avx2")) print("avx2int16", rate(threads, seconds, [](int) { return dot_avx2int16(); }));
  if (__builtin_cpu_supports("avx512f")) {
    print("avx512", rate(threads, seconds, [](int) { return fma_avx512(); }));
    print("max", rate(threads, seconds, [](int) { return max_avx512(); }));
  }
  if (__builtin_cpu_supports("avx512bf16")) print("avx512bf16", rate(threads, seconds, [](int) { return dot_avx512bf16(); }));
  if (amx_granted()) print("amx", rate(threads, seconds, [](int) { return amx_bf16(); }));

  // Read bandwidth: every thread sums its own 128 MB.
  constexpr size_t words = size_t(16) << 20;
  std::vector<std::vector<double>> data(threads, std::vector<double>(words, 1.0));
  volatile double sink = 0;
  print("bytes", rate(threads, seconds, [&](int t) {
          double s[16] = {};
          for (size_t i = 0; i < words; i += 16)
            for (int j = 0; j < 16; ++j) s[j] += data[t][i + j];
          for (double v : s) sink = v;
          return 8.0 * words;
        }));
  std::printf("%s}\n", out.c_str());
  return 0;
}
