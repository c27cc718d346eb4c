// From screened bounds to indices: which codes can win, their float64 values, and the rows that are compared with every code.
//
// Lists of rows and of candidates are filled by integer atomics: their order depends on the schedule, no result does, because
// the smallest value and among equals the lowest index wins in any order.
#ifndef VQK_CUDA_NEAREST_FINISH_CUH
#define VQK_CUDA_NEAREST_FINISH_CUH

#include "cuda/nearest_pack.cuh"
#include "cuda/winner.cuh"

namespace vqk {
namespace nearest {

constexpr int merge_rows = 8, most_sliced = 4096;

VQK_DEVICE float dot_chunk(const unsigned char *a, const unsigned char *b, float sum) {
  const uint4 x = *reinterpret_cast<const uint4 *>(a), y = *reinterpret_cast<const uint4 *>(b);
  const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Products of two float16 are exact in float32.
    sum += half_to_float(static_cast<uint16_t>(left[i])) * half_to_float(static_cast<uint16_t>(right[i]));
    sum += half_to_float(static_cast<uint16_t>(left[i] >> 16)) * half_to_float(static_cast<uint16_t>(right[i] >> 16));
  }
  return sum;
}

// One warp per row: the threshold from all lists, then the codes of the groups that reach it; rows where a group that
// nobody remembers can reach it go on the list of wide rows. Grid: (8 rows each, heads).
__global__ void __launch_bounds__(merge_rows * 32, 3) collect(const Search s) {
  start_kernel();
  const int head = static_cast<int>(blockIdx.y), row = static_cast<int>(blockIdx.x) * merge_rows + warp();
  if (row >= s.rows) return;
  const int64_t base = static_cast<int64_t>(head) * s.rows_padded;
  const float state = s.info[base * 5 + 4 * static_cast<int64_t>(s.rows_padded) + row];
  if (state != row_searched) {
    if (lane() == 0) s.count[base + row] = state == row_hopeless ? 0 : capacity + 1;
    return;
  }
  const float4 *part = s.part + static_cast<int64_t>(head) * s.lists * s.rows_padded + row;
  float lower = -INFINITY, second = -INFINITY;
  for (int i = lane(); i < s.lists; i += 32) {
    const float4 list = part[static_cast<int64_t>(i) * s.rows_padded];
    lower = fmaxf(lower, list.x);
    second = fmaxf(second, list.z);
  }
  lower = max_warp(lower);
  second = max_warp(second);
  if (second >= lower && second > -INFINITY) {
    if (lane() == 0) {
      s.threshold[base + row] = lower;
      s.count[base + row] = 0;
      s.wide[base + atomicAdd(&s.counters[head], 1)] = row;
    }
    return;
  }
  const RowBound r = row_bound(s, head, row);
  const int chunks = s.layout.width / 8, pitch = 2 * s.layout.width, quarter = lane() % 4;
  int found = 0;
  for (int first = 0; first < s.lists; first += 32) {
    float4 list = make_float4(-INFINITY, -INFINITY, -INFINITY, 0);
    if (first + lane() < s.lists) list = part[static_cast<int64_t>(first + lane()) * s.rows_padded];
    uint32_t live = __ballot_sync(~0u, list.y >= lower && list.y > -INFINITY);
    for (; live != 0; live &= live - 1) {
      const int group = __shfl_sync(~0u, __float_as_int(list.w), __ffs(static_cast<int>(live)) - 1);
      for (int i = 0; i < s.span; i += 8) {  // 8 codes at a time, 4 lanes each
        const int code = group * 8 + i + lane() / 4, tile = code / tile_codes, column = column_of_code(code % tile_codes);
        const unsigned char *codes = tile_start(s, head, tile);
        float sum = 0;
        for (int panel = 0; panel < s.layout.panels; ++panel)
          for (int chunk = quarter; chunk < chunks; chunk += 4)
            sum = dot_chunk(row_chunk(s, head, row, panel, chunk),
                            codes + panel * tile_codes * pitch + swizzled(column, 16 * chunk, pitch), sum);
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float *trailer = reinterpret_cast<const float *>(codes + s.layout.panels * tile_codes * pitch);
        const float t = __fmaf_rn(r.f, trailer[code % tile_codes], sum);
        const bool hit = quarter == 0 && t + bound(r, trailer + tile_codes) >= lower && t > -INFINITY;
        const uint32_t hits = __ballot_sync(~0u, hit);
        const int position = found + __popc(hits & ((1u << lane()) - 1));
        if (hit && position < capacity) s.listed[(base + row) * capacity + position] = code;
        found += __popc(hits);
      }
    }
  }
  if (lane() == 0) s.count[base + row] = found;
}

// The value to minimise of a row and a code: float64, the dims in ascending order, nothing fused.
VQK_DEVICE double pair_value(const Search &s, int head, int64_t x, int code) {
  const int64_t e = code_start(s, head, code);
  double total = 0, square = 0;
  for (int d = 0; d < s.dim; ++d) {
    const double a = load_float(s.x, s.x_dtype, x + d * s.x_dim), b = load_float(s.e, s.e_dtype, e + d * s.e_dim);
    if (s.metric == VQK_L2) {
      const double difference = __dsub_rn(a, b);
      total = __dadd_rn(total, __dmul_rn(difference, difference));
    } else {
      total = __dadd_rn(total, __dmul_rn(a, b));
      if (s.metric == VQK_COSINE && s.norms == nullptr) square = __dadd_rn(square, __dmul_rn(b, b));
    }
  }
  if (s.metric == VQK_L2) return total;
  if (s.metric == VQK_COSINE) {
    const double norm = s.norms != nullptr ? s.norms[static_cast<int64_t>(head) * s.num_codes + code] : __dsqrt_rn(square);
    if (norm > 0)
      total = __ddiv_rn(total, norm);
    else
      total = total != total ? total : __dmul_rn(0.0, total);
  }
  return -total;
}

VQK_DEVICE void store_result(const Search &s, int head, int64_t n, int code, double value) {
  s.indices[head * s.num_rows + n] = code;
  s.score[head * s.num_rows + n] = __double2float_rn(s.metric == VQK_L2 ? value : -value);
}

// One thread per row: the best listed code, code 0 where the list is empty. Grid: (128 rows each, heads).
__global__ void __launch_bounds__(128) decide(const Search s) {
  start_kernel();
  const int head = static_cast<int>(blockIdx.y), row = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  if (row >= s.rows) return;
  const int64_t at = static_cast<int64_t>(head) * s.rows_padded + row;
  const int count = s.count[at];
  if (count > capacity) {
    const int slot = atomicAdd(&s.counters[s.heads], 1);
    s.scan[slot] = static_cast<int32_t>(at);
    if (slot < most_sliced) s.ticket[slot] = 0;
    return;
  }
  const int64_t n = s.first_row + row, x = row_start(s, head, n);
  double best = INFINITY;
  int winner = 0;
  for (int i = 0; i < max(count, 1); ++i) {
    const int code = i < count ? s.listed[at * capacity + i] : 0;
    const double value = pair_value(s, head, x, code);
    if (i == 0 || value < best || (value == best && code < winner)) {
      best = value;
      winner = code;
    }
  }
  store_result(s, head, n, winner, best);
}

// Before a direct search. One block.
__global__ void __launch_bounds__(256) clear_tickets(const Search s) {
  start_kernel();
  for (int64_t i = threadIdx.x; i < s.heads * s.num_rows; i += 256) s.ticket[i] = 0;
}

struct ScanShared {
  double value[8];
  int32_t code[8];
};

// Every code in float64 for the listed rows (all rows in a direct search); a row's codes may be split into slices, and
// the block that finishes last takes the best of them. Grid: persistent.
__global__ void __launch_bounds__(256, 2) scan_rows(const Search s) {
  start_kernel();
  ScanShared &shared = shared_memory<ScanShared>();
  const int64_t listed = s.direct ? s.heads * s.num_rows : s.counters[s.heads];
  const int slices = listed <= most_sliced ? s.slices : 1, per = (s.num_codes + slices - 1) / slices;
  for (int64_t item = blockIdx.x; item < listed * slices; item += gridDim.x) {
    const int64_t slot = item / slices;
    const int slice = static_cast<int>(item % slices);
    const int64_t entry = s.direct ? slot : s.scan[slot], width = s.direct ? s.num_rows : s.rows_padded;
    const int head = static_cast<int>(entry / width);
    const int64_t n = entry % width + s.first_row, x = row_start(s, head, n);
    double best = INFINITY;
    int winner = INT32_MAX;
    for (int code = slice * per + static_cast<int>(threadIdx.x); code < min((slice + 1) * per, s.num_codes); code += 256) {
      const double value = pair_value(s, head, x, code);
      if (value < best) {  // NaN and infinity do not
        best = value;
        winner = code;
      }
    }
    best_of_warp(best, winner);
    if (lane() == 0) {
      shared.value[warp()] = best;
      shared.code[warp()] = winner;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < 8; ++i)
        if (beats(shared.value[i], shared.code[i], best, winner)) {
          best = shared.value[i];
          winner = shared.code[i];
        }
      bool last = true;
      if (slices > 1) {
        s.slice_value[item] = best;
        s.slice_code[item] = winner;
        __threadfence();
        last = atomicAdd(&s.ticket[slot], 1) == slices - 1;
        if (last) {
          __threadfence();
          // Volatile: what other blocks wrote must not come from this one's L1.
          const volatile double *values = s.slice_value + slot * slices;
          const volatile int32_t *codes = s.slice_code + slot * slices;
          for (int i = 0; i < slices; ++i) {
            const double value = values[i];
            const int code = codes[i];
            if (beats(value, code, best, winner)) {
              best = value;
              winner = code;
            }
          }
        }
      }
      if (last) {
        const bool none = !(best < INFINITY);
        if (none) winner = 0;
        store_result(s, head, n, winner, none ? pair_value(s, head, x, 0) : best);
      }
    }
    __syncthreads();
  }
}

}  // namespace nearest
}  // namespace vqk

#endif
