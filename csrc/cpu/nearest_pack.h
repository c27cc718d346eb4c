// Packing, shared by every instruction set: codes and rows to screen units, with the norms that the bound needs.
// Included by nearest_<isa>.cpp only, inside that file's flags; everything has internal linkage.
#ifndef VQK_CPU_NEAREST_PACK_H
#define VQK_CPU_NEAREST_PACK_H

#include <cmath>
#include <new>

#include "cpu/nearest.h"

namespace vqk {
namespace {

// Twice gamma_n for the roundings of a dot product of `dim` terms summed in any order with the bias, two roundings each.
VQK_INLINE float dot_error(int64_t dim) {
  const double n = 2.0 * static_cast<double>(dim) + 16.0;
  return static_cast<float>(2.0 * n * 0x1p-24 / (1.0 - n * 0x1p-24));
}

constexpr float kSlack = 1.0f + 0x1p-18f;  // covers the float32 arithmetic on the bounds themselves

// What rounding a row or a code to operands left behind: the value is element * factor, up to the error.
struct Quantised {
  float square;  // |value|^2
  float error;   // |value - element * factor|^2
  float factor;  // 1 unless the elements are integers
};

struct Interleaved {  // [steps][16 codes]: one vector per step, or one broadcast per code
  VQK_INLINE void put(uint32_t *out, int c, int64_t s, const uint32_t *element, int count) {
    for (int i = 0; i < count; ++i) out[(s + i) * kCodes + c] = element[i];
  }
};

struct Tiled {  // [steps / 16][16 codes][16 steps]: the A operand of an AMX tile product
  VQK_INLINE void put(uint32_t *out, int c, int64_t s, const uint32_t *element, int) {
    std::memcpy(out + s * kCodes + c * 16, element, 64);
  }
};

// One code as float or double, converted into `copy` if the codebook is 16-bit.
VQK_INLINE const void *code_row(const vqk_codes *codebook, int64_t head_index, int64_t k, float *copy) {
  const void *row = offset(static_cast<const void *>(codebook->data), codebook->dtype,
                           head_index * codebook->stride[0] + k * codebook->stride[1]);
  if (codebook->dtype == VQK_F32 || codebook->dtype == VQK_F64) return row;
  const uint16_t *in = static_cast<const uint16_t *>(row);
  const int64_t dim = codebook->size[2];
  if (codebook->dtype == VQK_BF16)
    for (int64_t d = 0; d < dim; ++d) copy[d] = bf16_to_float(in[d]);
  else
    for (int64_t d = 0; d < dim; ++d) copy[d] = f16_to_float(in[d]);
  return copy;
}

// |e| of 8 codes, summed in the order of the contract: the decision divides by these very numbers.
template <class P>
void code_norms(const vqk_codes *codebook, int64_t head_index, int64_t first, float *copies, double *out) {
  const void *rows[8];
  const int64_t dim = codebook->size[2], last = codebook->size[1] - 1;
  for (int i = 0; i < 8; ++i) rows[i] = code_row(codebook, head_index, first + i < last ? first + i : last, copies + i * dim);
  if (codebook->dtype == VQK_F64) {
    const double *const *typed = reinterpret_cast<const double *const *>(rows);
    P::template decide<false>(typed, typed, dim, out);
  } else {
    const float *const *typed = reinterpret_cast<const float *const *>(rows);
    P::template decide<false>(typed, typed, dim, out);
  }
  for (int i = 0; i < 8; ++i) out[i] = std::sqrt(out[i]);
}

// A value in screen units. Float arithmetic where its range allows; its rounding is part of the bounds (2^-22 of the length).
template <class P, class T>
VQK_INLINE Quantised quantise_row(const T *row, const float *centre, const float *zeros, double scale, int64_t dim, float *values,
                                  uint32_t *out) {
  if (sizeof(T) == 4 && scale < 0x1p100 && scale > 0x1p-100)
    return P::quantise(reinterpret_cast<const float *>(row), centre, static_cast<float>(scale), dim, out);
  for (int64_t d = 0; d < dim; ++d)
    values[d] = static_cast<float>(scale * (static_cast<double>(row[d]) - static_cast<double>(centre[d])));
  return P::quantise(values, zeros, 1.0f, dim, out);
}

// What a code without a usable bound is: 0 one that can never win, 1 one that only a scan in float64 can judge.
VQK_INLINE int32_t needs_scan(const vqk_codes *codebook, int64_t head_index, int64_t k, int32_t metric) {
  const int64_t at = head_index * codebook->stride[0] + k * codebook->stride[1];
  bool nan = false, infinite = false;
  for (int64_t d = 0; d < codebook->size[2]; ++d) {
    const double value = load_element(codebook->data, codebook->dtype, at + d);
    nan = nan || value != value;
    infinite = infinite || std::isinf(value);
  }
  // A NaN never wins; an infinity does so only by "dot".
  return nan || (infinite && metric != VQK_DOT) ? 0 : 1;
}

VQK_INLINE void exclude_by_bias(PackedHead *head, int64_t code) { head_bias(head)[code] = -INFINITY; }

template <class P, class Place>
int32_t pack_codes(const vqk_codes *codebook, int64_t head_index, int32_t metric, PackedHead *head, int64_t begin, int64_t end,
                   GroupBound *block_bounds, uint64_t *keys) {
  const int64_t dim = head->dim, steps = head->steps;
  const bool split = P::splits && dim <= kSplitDims;
  // Integer sums are exact: what rounds is the conversion, the factors and the bias.
  const float a = dot_error(P::exact_sums ? 1 : split ? 3 * dim : dim);
  const double sums = 0x1p-23 * static_cast<double>(dim + 32);     // rounding of the float32 sums of squares, relative
  const double decision = 0x1p-49 * static_cast<double>(dim + 4);  // rounding of the float64 decision, relative
  const double floor = 0x1p-124 * static_cast<double>(dim + 32);   // squares that underflow
  float *zeros = new (std::nothrow) float[static_cast<size_t>(2 * dim + steps + 32 + 8 * dim)]();
  if (zeros == nullptr) return -1;
  float *values = zeros + dim, *copies = values + dim + 16;
  uint32_t *elements = reinterpret_cast<uint32_t *>(copies + 8 * dim);
  int32_t scan = 0;
  for (int64_t block = begin; block < end; ++block) {
    uint32_t *out = head_codes(head) + block * steps * kCodes;
    GroupBound bound = {0, 0, 0, 0};
    for (int c = 0; c < kCodes; ++c) {
      const int64_t k = block * kCodes + c;
      if (metric == VQK_COSINE && c % 8 == 0 && k < head->num_codes)
        code_norms<P>(codebook, head_index, k, copies, head_norms(head) + k);
      bool usable = k < head->num_codes;
      const int64_t given = usable ? code_at(head, k) : k;
      Quantised code = {0, 0, 0};
      if (usable) {
        double scale = head->scale;
        if (metric == VQK_COSINE) {
          const double norm = head_norms(head)[k];
          scale = norm > 0 ? 1.0 / norm : 0.0;
          // Squares that underflow or overflow make the norm, and so the decision, differ from the direction of the code.
          if (norm > 0 && !(norm > 1e-140 && norm < 1e140)) scan |= needs_scan(codebook, head_index, given, metric);
        }
        const void *row = code_row(codebook, head_index, given, copies);
        if (codebook->dtype == VQK_F64)
          code = quantise_row<P>(static_cast<const double *>(row), head_centre(head), zeros, scale, dim, values, elements);
        else
          code = quantise_row<P>(static_cast<const float *>(row), head_centre(head), zeros, scale, dim, values, elements);
        if (!(code.square < 1e36f) || !(code.error < 1e36f)) {
          scan |= needs_scan(codebook, head_index, given, metric);
          usable = false;
          code.factor = 0;
        }
      }
      int64_t used = 0;
      uint32_t hash[2] = {0, 0};
      float bias = -INFINITY;
      if (usable) {
        used = P::used_steps(dim);
        if (split) {  // rows are [x1 x2 x1], codes [e1 e1 e2]
          uint16_t *parts = reinterpret_cast<uint16_t *>(elements);
          for (int64_t d = 0; d < dim; ++d) parts[2 * dim + d] = parts[dim + d];
          for (int64_t d = 0; d < dim; ++d) parts[dim + d] = parts[d];
          // The bias is added below, when it is known.
          for (int64_t i = 0; i < 3; ++i) parts[3 * dim + i] = 0;
        }
        for (int64_t s = 0; s < used; ++s) {
          hash[0] += elements[s] * (static_cast<uint32_t>(s) * 0x9e3779b1u | 1u);
          hash[1] += (elements[s] >> 7) * (static_cast<uint32_t>(s) * 0x85ebca6bu | 1u);
        }
        hash[0] ^= float_to_bits(code.factor);
        const double square = static_cast<double>(code.square), half = metric == VQK_L2 ? square / 2 : 0.0;
        const double reach = std::sqrt(square * (1 + sums) + floor);
        const double residual = std::sqrt(static_cast<double>(code.error) * (1 + sums) + floor) + 0x1p-22 * reach;
        // Split operands leave out x2 . e2, and |x2| <= 2^-8 |x|, |e2| <= 2^-8 |e|.
        const double spread = residual + a * (reach + residual) * (1 + 0x1p-6) + (split ? 0x1.1p-16 * reach : 0.0);
        const double offset = half * (a + sums + 0x1p-21 + decision) + 0x1p-100;
        const float reach_up = static_cast<float>(reach) * kSlack, spread_up = static_cast<float>(spread) * kSlack;
        const float offset_up = static_cast<float>(offset) * kSlack;
        bound.reach = reach_up > bound.reach ? reach_up : bound.reach;
        bound.spread = spread_up > bound.spread ? spread_up : bound.spread;
        bound.offset = offset_up > bound.offset ? offset_up : bound.offset;
        bias = static_cast<float>(-half);
      }
      for (int64_t s = used; s < steps; ++s) elements[s] = 0;
      if (split) {
        uint16_t *parts = reinterpret_cast<uint16_t *>(elements) + 3 * dim;
        float rest = bias;
        for (int i = 0; i < 3; ++i) {
          parts[i] = float_to_bf16(rest);
          rest = usable ? rest - bf16_to_float(parts[i]) : 0.0f;
        }
      }
      for (int64_t s = 0; s < steps; s += 16)
        Place::put(out, c, s, elements + s, steps - s < 16 ? static_cast<int>(steps - s) : 16);
      keys[k] = static_cast<uint64_t>(hash[0]) << 32 | hash[1];
      head_bias(head)[k] = bias;
      head_factors(head)[k] = code.factor;
    }
    block_bounds[block] = bound;
  }
  delete[] zeros;
  return scan;
}

VQK_INLINE int64_t row_start(const Block *block, int64_t row) {
  const int64_t n = block->first + row, inner = block->x->size[2];
  return block->head_index * block->x->stride[0] + n / inner * block->x->stride[1] + n % inner * block->x->stride[2];
}

VQK_INLINE bool rows_in_place(const vqk_rows *x) {
  return (x->dtype == VQK_F32 || x->dtype == VQK_F64) && (x->stride[3] == 1 || x->size[3] == 1);
}

VQK_INLINE const float *float_row(const Block *block, int64_t row) {
  if (rows_in_place(block->x)) return static_cast<const float *>(block->x->data) + row_start(block, row);
  return static_cast<const float *>(block->row_copy) + row * block->head->dim;
}

VQK_INLINE const double *double_row(const Block *block, int64_t row) {
  if (rows_in_place(block->x)) return static_cast<const double *>(block->x->data) + row_start(block, row);
  return static_cast<const double *>(block->row_copy) + row * block->head->dim;
}

// Row-major copies of rows [begin, end) (at most P::lanes of them), when x can't be read in place.
template <class P>
void copy_rows(Block *block, int64_t begin, int64_t end) {
  const vqk_rows *x = block->x;
  const int64_t dim = block->head->dim, stride = x->stride[3], count = end - begin;
  if (x->dtype == VQK_F64) {
    for (int64_t r = begin; r < end; ++r) {
      const double *in = static_cast<const double *>(x->data) + row_start(block, r);
      double *out = static_cast<double *>(block->row_copy) + r * dim;
      for (int64_t d = 0; d < dim; ++d) out[d] = in[d * stride];
    }
    return;
  }
  float *out = static_cast<float *>(block->row_copy) + begin * dim;
  const int64_t start = row_start(block, begin);
  const bool together = count == P::lanes && x->stride[2] == 1 && row_start(block, end - 1) == start + count - 1;
  if (together && x->dtype == VQK_F32) {  // a channel-first map: transpose lanes x lanes tiles
    const float *in = static_cast<const float *>(x->data) + start;
    int64_t d = 0;
    for (; d + P::lanes <= dim; d += P::lanes)
      P::transpose(reinterpret_cast<const uint32_t *>(in + d * stride), stride, reinterpret_cast<uint32_t *>(out + d), dim);
    for (; d < dim; ++d)
      for (int64_t r = 0; r < count; ++r) out[r * dim + d] = in[d * stride + r];
    return;
  }
  for (int64_t r = begin; r < end; ++r, out += dim) {
    const void *in = offset(static_cast<const void *>(x->data), x->dtype, row_start(block, r));
    if (x->dtype == VQK_F32) {
      for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<const float *>(in)[d * stride];
    } else if (x->dtype == VQK_BF16 && stride == 1) {
      for (int64_t d = 0; d < dim; ++d) out[d] = bf16_to_float(static_cast<const uint16_t *>(in)[d]);
    } else if (x->dtype == VQK_BF16) {
      for (int64_t d = 0; d < dim; ++d) out[d] = bf16_to_float(static_cast<const uint16_t *>(in)[d * stride]);
    } else {
      for (int64_t d = 0; d < dim; ++d) out[d] = f16_to_float(static_cast<const uint16_t *>(in)[d * stride]);
    }
  }
}

// Rows to screen units, packed [row tile][steps][lanes], with the numbers per row that the score and its bound need.
template <class P>
void prepare_rows(Block *block) {
  constexpr int lanes = P::lanes;
  const PackedHead *head = block->head;
  const int64_t dim = head->dim, steps = head->steps, padded = block->padded_rows;
  const bool in_place = rows_in_place(block->x), wide = block->x->dtype == VQK_F64;
  const float *centre = head_centre(head);
  float *values = block->convert;                                                // one row
  uint32_t *elements = reinterpret_cast<uint32_t *>(block->convert + dim + 32);  // [lanes][steps + 16]
  const int64_t pitch = steps + 16;
  const float decision = 0x1p-49f * static_cast<float>(dim + 4), floor = 0x1p-124f * static_cast<float>(dim + 32);
  const float sums = 1.0f + 0x1p-23f * static_cast<float>(dim + 32);  // rounding of the float32 sums of squares

  for (int64_t tile = 0; tile < padded; tile += lanes) {
    const int64_t end = tile + lanes < block->rows ? tile + lanes : block->rows;
    if (!in_place && tile < end) copy_rows<P>(block, tile, end);
    for (int64_t r = tile; r < tile + lanes; ++r) {
      uint32_t *out = elements + (r - tile) * pitch;
      block->row_scan[r] = 0;
      if (r < block->rows) {
        const Quantised row = wide
                                  ? quantise_row<P>(double_row(block, r), centre, block->zeros, head->row_scale, dim, values, out)
                                  : quantise_row<P>(float_row(block, r), centre, block->zeros, head->row_scale, dim, values, out);
        for (int64_t s = P::used_steps(dim); s < steps; ++s) out[s] = 0;
        const float length = std::sqrt(row.square * sums + floor) * kSlack;
        // 2^-22 |x'|: rounding of x - centre and of the conversion to float32.
        const float residual = std::sqrt(row.error * sums + floor) * kSlack + 0x1p-22f * length;
        block->row_length[r] = (length + residual) * kSlack;  // |x'| and |rounded x'| are at most this
        block->row_residual[r] = residual;
        block->row_factor[r] = row.factor;
        block->row_offset[r] = decision * length * length;
        if (!(length < 1e18f) || !(length * head->reach < 1e36f)) block->row_scan[r] = 1;
      }
      if (r >= block->rows || block->row_scan[r]) {
        for (int64_t s = 0; s < steps; ++s) out[s] = 0;
        block->row_length[r] = block->row_residual[r] = block->row_offset[r] = block->row_factor[r] = 0;
      }
    }
    uint32_t *packed = block->packed_rows + tile * steps;
    int64_t s = 0;
    for (; s + lanes <= steps; s += lanes) P::transpose(elements + s, pitch, packed + s * lanes, lanes);
    for (; s < steps; ++s)
      for (int r = 0; r < lanes; ++r) packed[s * lanes + r] = elements[r * pitch + s];
  }
}

}  // namespace
}  // namespace vqk

#endif
