// soft_assign and soft_assign_grad on CPU: the kernels of an instruction set, and the blocks of rows that go through them.
//
// A block's scores for all codes are made once (products of rows with packed panels of codes), become probabilities or their
// gradient in place, row by row, and are then summed over rows by panels of codes. So a pair costs D multiply-adds and one exp
// forward, 3 D and one exp backward. How many rows a block has depends on the sizes alone, and so does every order of summation:
// threads share the panels, rows and dims of a step, never a sum.
#ifndef VQK_CPU_SOFT_ASSIGN_H
#define VQK_CPU_SOFT_ASSIGN_H

#include "cpu/elements.h"

namespace vqk {

// One instruction set's kernels (soft_assign_simd.h). Codes lie in panels, dim by dim; scores and probabilities row by row.
struct SoftKernels {
  int64_t lanes;  // of a vector
  int64_t panel;  // codes
  int64_t tile;   // rows or dims that are summed side by side
  // out[r][k] = (scale x_r.c_k - offset_k) factor, for one panel of codes.
  void (*scores)(const float *x, int64_t x_pitch, int64_t rows, int64_t dim, const float *codes, const float *offset, float scale,
                 float factor, float *out, int64_t pitch);
  // Score s of one row to e = exp(s - largest), in place; sum of e, and of e (s - largest).
  void (*exponentials)(float *score, int64_t codes, double *sum, double *moment);
  // Score of one row to t = weight p (a - sum p a), in place, for a = soft + usage - entropy log p; soft holds a afterwards.
  void (*gradient)(float *score, float *soft, const float *usage, float entropy, float weight, int64_t codes);
  // total[k] += sum_r factors[r] values[r][k], for one panel.
  void (*columns)(const float *values, int64_t pitch, int64_t rows, const float *factors, double *total);
  // out[r][d] += sum_k values[r][k] codes[k][d], for `vectors` vectors of dims.
  void (*row_sums)(const float *values, int64_t pitch, int64_t rows, const float *codes, int64_t code_pitch, int64_t num_codes,
                   int64_t vectors, float *out, int64_t out_pitch);
  // out[d][k] += sum_r values[r][k] x[r][d], for one panel and dims from `begin` to `end`.
  void (*code_sums)(const float *values, int64_t pitch, int64_t rows, const float *x, int64_t x_pitch, int64_t begin, int64_t end,
                    float *out);
};

extern const SoftKernels soft_kernels_scalar, soft_kernels_avx2, soft_kernels_avx512, soft_kernels_neon;

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Floats that begin on the edge of a cache line; null without memory.
class Floats {
 public:
  explicit Floats(int64_t count) : memory_(allocate<float>(count + kLine)) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    if (memory_) start_ = memory_.get() + (64 - address % 64) % 64 / sizeof(float);
  }
  float *get() const { return start_; }
  explicit operator bool() const { return start_ != nullptr; }

  static constexpr int64_t kLine = 16;  // a cache line
 private:
  std::unique_ptr<float[]> memory_;
  float *start_ = nullptr;
};

// Sizes of a call. Pitches are never a multiple of a large power of two, or the rows of a block would share a few cache sets.
struct SoftPlan {
  const SoftKernels *kernels;
  int64_t heads, rows, codes, dim;
  int64_t panels, padded_codes, pitch;  // of scores
  int64_t row_pitch;                    // of rows, and of codes as they come
  int64_t block_rows;

  float *panel(float *packed, int64_t index) const { return packed + index * dim * kernels->panel; }
  const float *panel(const float *packed, int64_t index) const { return packed + index * dim * kernels->panel; }
};

int32_t soft_plan(const vqk_rows &x, const vqk_codes &codes, int32_t isa, SoftPlan &plan);

// One head's codes in panels, zeros beyond the last; `offset` (or null) is what is taken from a score: |c|^2 if squared, infinity
// beyond the last code; `plain` (or null) are the codes as they come, zeros beyond the last dim.
void soft_pack(const SoftPlan &plan, const vqk_codes &codes, int64_t head, bool squared, float *packed, float *offset,
               float *plain);

// Rows of a block as floats, zeros where the weight is 0.
void soft_load(const SoftPlan &plan, const vqk_rows &x, const float *weight, int64_t head, int64_t first, int64_t count,
               float *out);

void soft_scores(const SoftPlan &plan, const float *x, int64_t count, const float *packed, const float *offset, double scale,
                 double factor, float *out);

// Subnormal numbers count as 0 while this is alive: most probabilities of a sure row are next to nothing, and a processor takes a
// hundred times as long for what is subnormal.
class FlushSubnormals {
#if defined(__SSE2__)
 public:
  FlushSubnormals() { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals &) = delete;
  FlushSubnormals &operator=(const FlushSubnormals &) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
#endif
};

// parallel_for over pairs of `outer` and `inner`: body(outer, begin, end) with ranges of `inner`.
template <class F>
void parallel_ranges(int64_t outer, int64_t inner, int64_t grain, const F &body) {
  parallel_for(0, outer * inner, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t o = begin / inner, stop = std::min(end, (o + 1) * inner);
      body(o, begin - o * inner, stop - o * inner);
      begin = stop;
    }
  });
}

// Items per work item, so that one is worth handing to another thread.
inline int64_t soft_grain(int64_t cost) { return 1 + (int64_t{1} << 17) / std::max<int64_t>(cost, 1); }

}  // namespace vqk

#endif
