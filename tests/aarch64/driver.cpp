// The CPU library's kernels on another processor than the one that compiles them: run by test_aarch64.py under qemu.
//
// Each instruction set that runs here against plain loops in float64: `nearest` (index and score to the bit), `soft_assign` and
// its gradient (to float32 rounding). Prints a line per instruction set; exits with 1 at the first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "capi.h"

namespace {

uint64_t state = 88172645463325252ull;

double uniform() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<double>(state >> 11) * 0x1p-53;
}

float normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return static_cast<float>(sum);
}

void require(bool holds, const char *what, int64_t n, int64_t k, int64_t d, int metric, int64_t at) {
  if (holds) return;
  std::printf("%s differs: N=%lld K=%lld D=%lld metric=%d at %lld; %s\n", what, (long long)n, (long long)k, (long long)d, metric,
              (long long)at, vqk_last_error());
  std::exit(1);
}

struct Data {
  int64_t n, k, d;
  std::vector<float> x, codes;
  vqk_rows rows;
  vqk_codes book;

  Data(int64_t n_, int64_t k_, int64_t d_, float offset) : n(n_), k(k_), d(d_), x(n * d), codes(k * d) {
    for (float &v : x) v = normal() + offset;
    for (float &v : codes) v = normal() + offset;
    for (int64_t c = 1; c < k; ++c) {
      const int64_t of = c % 2 == 1 ? c - 1 : c / 2;
      if (c % 2 == 1 || c % 6 == 0)  // the same values backwards, or repeated: the lowest index wins
        for (int64_t i = 0; i < d; ++i) codes[c * d + i] = codes[of * d + (c % 2 == 1 ? d - 1 - i : i)];
    }
    for (int64_t r = 0; r < n; r += 4)  // between two codes
      for (int64_t i = 0; i < d; ++i) x[r * d + i] = 0.5f * (codes[r % k * d + i] + codes[(r + 2) % k * d + i]);
    for (int64_t r = 1; r < n; r += 4)  // as far from a code as from the same one backwards, but for the order of the sum
      std::fill(x.begin() + r * d, x.begin() + (r + 1) * d, offset);
    rows = {x.data(), {1, 1, n, d}, {n * d, n * d, d, 1}, VQK_F32, 0};
    book = {codes.data(), {1, k, d}, {k * d, d, 1}, VQK_F32, 0};
  }
  double product(int64_t r, int64_t c) const {
    double sum = 0;
    for (int64_t i = 0; i < d; ++i) sum += static_cast<double>(x[r * d + i]) * static_cast<double>(codes[c * d + i]);
    return sum;
  }
};

void search(const Data &data, int metric, int isa) {
  std::vector<int64_t> index(data.n);
  std::vector<float> score(data.n);
  const int64_t bytes = vqk_cpu_nearest_packed_bytes(&data.book, metric, isa);
  void *packed = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  require(vqk_cpu_nearest_pack(&data.book, metric, isa, packed) == VQK_OK, "packing", data.n, data.k, data.d, metric, 0);
  const int32_t status = vqk_cpu_nearest(&data.rows, &data.book, metric, VQK_EXACT, isa, packed, index.data(), score.data());
  require(status == VQK_OK, "status", data.n, data.k, data.d, metric, status);
  std::free(packed);
  std::vector<double> norm(data.k, 1.0);
  if (metric == VQK_COSINE)
    for (int64_t c = 0; c < data.k; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < data.d; ++i)
        sum += static_cast<double>(data.codes[c * data.d + i]) * static_cast<double>(data.codes[c * data.d + i]);
      norm[c] = std::sqrt(sum);
    }
  for (int64_t r = 0; r < data.n; ++r) {
    int64_t best = -1;
    double value = 0;
    for (int64_t c = 0; c < data.k; ++c) {
      double found = 0;
      if (metric == VQK_L2)
        for (int64_t i = 0; i < data.d; ++i) {
          const double difference = static_cast<double>(data.x[r * data.d + i]) - static_cast<double>(data.codes[c * data.d + i]);
          found += difference * difference;
        }
      else
        found = data.product(r, c) / norm[c];
      if (best < 0 || (metric == VQK_L2 ? found < value : found > value)) best = c, value = found;
    }
    require(index[r] == best, "index", data.n, data.k, data.d, metric, r);
    require(score[r] == static_cast<float>(value), "score", data.n, data.k, data.d, metric, r);
  }
}

void close(double found, double wanted, const char *what, const Data &data, int64_t at) {
  require(std::fabs(found - wanted) <= 2e-5 * (1 + std::fabs(wanted)), what, data.n, data.k, data.d, 0, at);
}

// Mean entropy and mean probability of softmax(2 x.c - |c|^2), and their gradient against given ones.
void soften(const Data &data, int isa) {
  const int64_t n = data.n, k = data.k, d = data.d;
  std::vector<float> weight(n, 1.0f / static_cast<float>(n)), usage(k), dx(n * d), dcodes(k * d), grad_usage(k);
  float entropy = 0, grad_entropy = 0.5f;
  for (float &v : grad_usage) v = normal();
  const vqk_rows out = {dx.data(), {1, 1, n, d}, {n * d, n * d, d, 1}, VQK_F32, 0};
  require(vqk_cpu_soft_assign(&data.rows, &data.book, weight.data(), 1, 1.0, isa, &entropy, usage.data()) == VQK_OK, "status", n,
          k, d, 0, 0);
  require(vqk_cpu_soft_assign_grad(&data.rows, &data.book, weight.data(), &grad_entropy, grad_usage.data(), nullptr, nullptr, 1,
                                   1.0, isa, &out, dcodes.data()) == VQK_OK,
          "status of the gradient", n, k, d, 0, 0);
  std::vector<double> p(k), want_usage(k), want_codes(k * d);
  double want_entropy = 0;
  for (int64_t r = 0; r < n; ++r) {
    double top = -INFINITY, z = 0, own = 0, mean = 0;
    for (int64_t c = 0; c < k; ++c) {
      double square = 0;
      for (int64_t i = 0; i < d; ++i) square += static_cast<double>(data.codes[c * d + i]) * data.codes[c * d + i];
      p[c] = 2 * data.product(r, c) - square;
      top = std::max(top, p[c]);
    }
    for (double &v : p) z += v = std::exp(v - top);
    for (int64_t c = 0; c < k; ++c) {
      p[c] /= z;
      if (p[c] > 0) own -= p[c] * std::log(p[c]);
      want_usage[c] += p[c] / static_cast<double>(n);
    }
    want_entropy += own / static_cast<double>(n);
    const auto said = [&](int64_t c) { return grad_usage[c] - grad_entropy * (p[c] > 0 ? std::log(p[c]) : 0.0); };
    for (int64_t c = 0; c < k; ++c) mean += p[c] * said(c);
    std::vector<double> row(d);
    for (int64_t c = 0; c < k; ++c) {
      const double t = p[c] * (said(c) - mean) / static_cast<double>(n);
      for (int64_t i = 0; i < d; ++i) {
        row[i] += 2 * t * data.codes[c * d + i];
        want_codes[c * d + i] += 2 * t * (static_cast<double>(data.x[r * d + i]) - data.codes[c * d + i]);
      }
    }
    for (int64_t i = 0; i < d; ++i) close(dx[r * d + i], row[i], "dx", data, r);
  }
  close(entropy, want_entropy, "entropy", data, 0);
  for (int64_t c = 0; c < k; ++c) close(usage[c], want_usage[c], "usage", data, c);
  for (int64_t i = 0; i < k * d; ++i) close(dcodes[i], want_codes[i], "dcodes", data, i);
}

}  // namespace

int main() {
  const int64_t sizes[][3] = {{1, 1, 1}, {3, 5, 3}, {8, 700, 12}, {9, 33, 8}, {40, 130, 17}, {61, 257, 64}, {203, 97, 30}};
  const int64_t soft[][3] = {{1, 1, 1}, {7, 13, 3}, {50, 130, 17}};
  for (int isa : {VQK_SCALAR, VQK_AVX2, VQK_AVX512, VQK_AVX512BF16, VQK_AMX, VQK_NEON}) {
    if (!vqk_cpu_has_isa(isa)) continue;
    for (const auto &s : sizes)
      for (int metric : {VQK_L2, VQK_COSINE, VQK_DOT})
        for (float offset : {0.0f, 3.0f}) search(Data(s[0], s[1], s[2], offset), metric, isa);
    for (const auto &s : soft) soften(Data(s[0], s[1], s[2], 0.0f), isa);
    std::printf("isa %d: equal%s\n", isa, vqk_cpu_best_isa() == isa ? ", the best here" : "");
  }
}
