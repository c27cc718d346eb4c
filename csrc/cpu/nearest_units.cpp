// The screen's view of a codebook: its centre, its scale, and the order in which codes are packed. Any choice is correct: these
// make the bounds tight, and so the candidates few.
#include <cmath>

#include "cpu/elements.h"
#include "cpu/nearest.h"

namespace vqk {
namespace {

constexpr int64_t kSample = 128;      // codes that centre and scale are taken from
constexpr int64_t kFirstDims = 8;     // dims that tell how long a code is, roughly
constexpr int kClasses = 128;         // of lengths: powers of two
constexpr double kMuchLonger = 64.0;  // squares: 8 times as long

// Calls visit(type, number in the sample, values) for a sample of codes.
template <class F>
void for_each_sample(const vqk_codes *codebook, int64_t head_index, const F &visit) {
  const int64_t k = codebook->size[1], sample = std::min(k, kSample);
  with_dtype(codebook->dtype, [&](auto e) {
    const auto *first = pointer<decltype(e)>(codebook->data) + head_index * codebook->stride[0];
    for (int64_t i = 0; i < sample; ++i) visit(e, i, first + i * k / sample * codebook->stride[1]);
  });
}

// |code - centre|^2 over the first dims.
template <class E>
float first_square(const typename E::raw *code, const float *centre, int64_t dim) {
  float part[4] = {0, 0, 0, 0}, total;
  const int64_t end = std::min(dim, kFirstDims);
  int64_t d = 0;
  for (; d + 4 <= end; d += 4)
    for (int64_t i = 0; i < 4; ++i) {
      const float difference = static_cast<float>(E::get(code[d + i])) - centre[d + i];
      part[i] += difference * difference;
    }
  total = (part[0] + part[1]) + (part[2] + part[3]);
  for (; d < end; ++d) {
    const float difference = static_cast<float>(E::get(code[d])) - centre[d];
    total += difference * difference;
  }
  return total;
}

// Its power of two, for lengths instead of squares; what is not finite is in the last class.
VQK_INLINE uint8_t length_class(float square) { return static_cast<uint8_t>((float_to_bits(square) & 0x7fffffffu) >> 24); }

// The mean of the sample, without the codes that are much longer than most: they would move it away from all others. Zero if the
// mean is no more than chance makes it: where most codes are long, that would be far away from the short ones.
int32_t choose_centre(const vqk_codes *codebook, int64_t head_index, PackedHead *head) {
  const int64_t dim = head->dim, sample = std::min(head->num_codes, kSample);
  float *centre = head_centre(head), square[kSample], sorted[kSample];  // the centre is zero until now
  for_each_sample(codebook, head_index, [&](auto e, int64_t i, const auto *code) {
    const float found = first_square<decltype(e)>(code, centre, dim);
    sorted[i] = square[i] = found < INFINITY ? found : INFINITY;
  });
  std::nth_element(sorted, sorted + sample / 2, sorted + sample);
  const double most = kMuchLonger * static_cast<double>(sorted[sample / 2]);
  const auto memory = allocate<double>(2 * dim);
  if (memory == nullptr) return fail(VQK_NO_MEMORY, "no memory for %lld dims", (long long)dim);
  double *sum = memory.get(), *squares = sum + dim, count = 0, length = 0, mean_length = 0;
  std::fill_n(sum, 2 * dim, 0.0);
  for_each_sample(codebook, head_index, [&](auto e, int64_t i, const auto *code) {
    if (!(static_cast<double>(square[i]) <= most)) return;
    count += 1;
    for (int64_t j = 0; j < dim; ++j) {
      const double given = static_cast<double>(decltype(e)::get(code[j])), value = std::fabs(given) < 1e30 ? given : 0.0;
      sum[j] += value;
      squares[j] += value * value;
    }
  });
  for (int64_t j = 0; j < dim; ++j) {
    mean_length += sum[j] / count * (sum[j] / count);
    length += squares[j] / count;
  }
  if (16 * mean_length < length) return VQK_OK;
  for (int64_t j = 0; j < dim; ++j) centre[j] = static_cast<float>(sum[j] / count);
  return VQK_OK;
}

}  // namespace

int32_t choose_units(const vqk_codes *codebook, int64_t head_index, int32_t metric, PackedHead *head) {
  if (metric == VQK_L2)
    if (const int32_t status = choose_centre(codebook, head_index, head)) return status;
  const float *centre = head_centre(head);
  double largest = 0;
  for_each_sample(codebook, head_index, [&](auto e, int64_t, const auto *code) {
    for (int64_t j = 0; j < head->dim; ++j) {
      const double distance = std::fabs(static_cast<double>(decltype(e)::get(code[j])) - static_cast<double>(centre[j]));
      if (distance < 1e150 && distance > largest) largest = distance;
    }
  });
  int exponent = 0;
  if (largest > 0) std::frexp(largest, &exponent);
  head->scale = metric == VQK_COSINE ? 1.0 : std::ldexp(1.0, -exponent);
  head->row_scale = metric == VQK_L2 ? head->scale : 1.0;
  // Squares of such distances underflow even in float64, and what underflows ties: only the decision knows.
  head->scan = metric == VQK_L2 && head->scale > 0x1p470 ? 1 : 0;
  return VQK_OK;
}

// One bound serves all codes of a block, and the longest of them sets it: next to a code a thousand times as long, all the others
// are candidates for every row. So codes of very different lengths do not share a block.
int32_t order_codes(const vqk_codes *codebook, int64_t head_index, int32_t metric, PackedHead *head) {
  head->ordered = 0;
  if (metric != VQK_L2) return VQK_OK;
  const int64_t codes = head->num_codes, dim = head->dim;
  const float *centre = head_centre(head);
  const auto memory = allocate<uint8_t>(codes);
  if (memory == nullptr) return fail(VQK_NO_MEMORY, "no memory to order %lld codes", (long long)codes);
  uint8_t *classes = memory.get(), sample[kSample];
  for_each_sample(codebook, head_index, [&](auto e, int64_t i, const auto *code) {
    sample[i] = length_class(first_square<decltype(e)>(code, centre, dim));
  });
  uint8_t *median = sample + std::min(codes, kSample) / 2;
  std::nth_element(sample, median, sample + std::min(codes, kSample));
  const int typical = *median;
  int64_t short_codes = 0, long_codes = 0;
  parallel_for(0, codes, 4096, [&](int64_t begin, int64_t end) {
    int64_t less = 0, more = 0;
    with_dtype(codebook->dtype, [&](auto e) {
      const auto *first = pointer<decltype(e)>(codebook->data) + head_index * codebook->stride[0];
      for (int64_t k = begin; k < end; ++k) {
        classes[k] = length_class(first_square<decltype(e)>(first + k * codebook->stride[1], centre, dim));
        less += classes[k] <= typical - 3;
        more += classes[k] >= typical + 3;
      }
    });
    __atomic_fetch_add(&short_codes, less, __ATOMIC_RELAXED);
    __atomic_fetch_add(&long_codes, more, __ATOMIC_RELAXED);
  });
  // A few short ones are nothing special where dims are few, and widen no bound but their own.
  if (long_codes == 0 && short_codes <= codes / 32) return VQK_OK;
  int64_t next[kClasses] = {}, total = 0;
  for (int64_t k = 0; k < codes; ++k) ++next[classes[k]];
  for (int64_t &start : next) total += std::exchange(start, total);
  // Within a class codes keep their order: of equal ones the first stays first.
  for (int64_t k = 0; k < codes; ++k) head_order(head)[next[classes[k]]++] = k;
  head->ordered = 1;
  return VQK_OK;
}

}  // namespace vqk
