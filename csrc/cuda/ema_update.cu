// ema_update: moving averages of the codebook statistics and the codes that follow from them: sizes and totals, then codes.
//
// The bits are the CPU kernel's, but for the total of a head: float64 sums of fixed parts in a fixed order, where the CPU
// adds code by code. Both are exact to 53 bits, and codes are rounded to 24.
#include "cuda/elements.cuh"

namespace vqk {
namespace {

constexpr int part_codes = 4096;  // codes whose sizes one block adds up
constexpr int lanes = 8;          // threads per code: the CPU's order of the sum of squares

struct TotalsShared {
  double lane[256];
};

__global__ void __launch_bounds__(256) update_sizes(float *cluster_size, const float *counts, int64_t num_codes, int64_t parts,
                                                    float keep, float take, double *totals) {
  start_kernel();
  TotalsShared &shared = shared_memory<TotalsShared>();
  const int64_t head = blockIdx.x / static_cast<uint32_t>(parts);
  const int64_t first = (blockIdx.x - head * parts) * part_codes;
  const int64_t last = min(first + part_codes, num_codes);
  double total = 0;
  for (int64_t k = first + threadIdx.x; k < last; k += 256) {
    const int64_t i = head * num_codes + k;
    const float size = __fadd_rn(__fmul_rn(keep, cluster_size[i]), __fmul_rn(take, counts[i]));
    cluster_size[i] = size;
    total = __dadd_rn(total, size);
  }
  shared.lane[threadIdx.x] = total;
  for (unsigned step = 128; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) shared.lane[threadIdx.x] = __dadd_rn(shared.lane[threadIdx.x], shared.lane[threadIdx.x + step]);
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = shared.lane[0];
}

__global__ void __launch_bounds__(256)
    update_codes(const float *cluster_size, float *embed_avg, float *codebook, const float *sums, int64_t all_codes,
                 int64_t num_codes, int64_t dim, int64_t parts, float keep, float take, double eps, int32_t normalize,
                 const double *totals) {
  start_kernel();
  const int64_t code = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) / lanes;
  const int64_t i = min(code, all_codes - 1);  // surplus threads go along, for the shuffles, and write nothing
  const bool own = code < all_codes;
  double total = 0;
  const int64_t head = static_cast<uint32_t>(i) / static_cast<uint32_t>(num_codes);
  for (int64_t part = 0; part < parts; ++part) total = __dadd_rn(total, totals[head * parts + part]);
  const double denominator = __dadd_rn(total, __dmul_rn(static_cast<double>(num_codes), eps));
  float smoothed = 0;
  if (denominator != 0)
    smoothed = static_cast<float>(__dmul_rn(__ddiv_rn(__dadd_rn(static_cast<double>(cluster_size[i]), eps), denominator), total));

  float *average = embed_avg + i * dim, *to = codebook + i * dim;
  const float *sum = sums + i * dim;
  const int first = static_cast<int>(threadIdx.x) % lanes;
  double square = 0;
  for (int64_t d = first; d < dim && own; d += lanes) {
    const float mean = __fadd_rn(__fmul_rn(keep, average[d]), __fmul_rn(take, sum[d]));
    average[d] = mean;
    if (smoothed == 0) continue;
    const float value = __fdiv_rn(mean, smoothed);
    square = __dadd_rn(square, __dmul_rn(value, value));
    to[d] = value;
  }
  if (!normalize) return;
  for (int step = 1; step < lanes; step *= 2) square = __dadd_rn(square, __shfl_xor_sync(~0u, square, step));
  if (smoothed == 0 || !own) return;
  const float norm = max(static_cast<float>(__dsqrt_rn(square)), 1e-12f);
  for (int64_t d = first; d < dim; d += lanes) to[d] = __fdiv_rn(to[d], norm);
}

}  // namespace
}  // namespace vqk

int64_t vqk_cuda_ema_update_workspace(int64_t heads, int64_t num_codes) {
  return heads * vqk::ceil_div(num_codes, vqk::part_codes) * static_cast<int64_t>(sizeof(double));
}

int32_t vqk_cuda_ema_update(float *cluster_size, float *embed_avg, float *codebook, const float *counts, const float *sums,
                            int64_t heads, int64_t num_codes, int64_t dim, double decay, double eps, int32_t normalize,
                            void *workspace, int32_t device, void *stream) {
  using namespace vqk;
  const OnDevice guard(device);
  if (guard.status() != VQK_OK) return guard.status();
  const int64_t all = heads * num_codes, parts = ceil_div(num_codes, part_codes), blocks = ceil_div(all * lanes, 256);
  if (all * dim == 0) return VQK_OK;
  if (blocks > INT32_MAX) return fail(VQK_UNSUPPORTED, "ema_update: %lld codes", static_cast<long long>(all));
  const float keep = static_cast<float>(decay), take = static_cast<float>(1.0 - decay);
  double *totals = static_cast<double *>(workspace);
  const int32_t status =
      launch("ema_update", update_sizes, {dim3(static_cast<uint32_t>(heads * parts)), 256, sizeof(TotalsShared), stream},
             cluster_size, counts, num_codes, parts, keep, take, totals);
  if (status != VQK_OK) return status;
  return launch("ema_update", update_codes, {dim3(static_cast<uint32_t>(blocks)), 256, 0, stream}, cluster_size, embed_avg,
                codebook, sums, all, num_codes, dim, parts, keep, take, eps, normalize, totals);
}
