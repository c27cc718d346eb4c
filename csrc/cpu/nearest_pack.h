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

// Element-wise rounding of a code to the screen's operand: bf16 (nearest even, subnormals flushed as the hardware does) or
// float32.
template <int DimsPerStep>
VQK_INLINE float round_operand(float value) {
  if (DimsPerStep == 1) return value;
  uint32_t bits = float_to_bits(value);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return bits_to_float((bits & 0x7f800000u) != 0 ? bits : 0u);
}

// `Place` puts the packed elements of code c of a block: at(steps, c, step). `Split`: see kSplitDims.
template <int DimsPerStep, class Place, bool Split = false>
int32_t pack_codes(const vqk_codes *codebook, int64_t head_index, int32_t metric, PackedHead *head, int64_t begin, int64_t end,
                   GroupBound *block_bounds) {
  const int64_t dim = head->dim, steps = head->steps, dims = steps * DimsPerStep;
  const float *centre = head_centre(head);
  const bool split = Split && dim <= kSplitDims;
  const float a = dot_error(split ? 3 * dim : dim);
  const double decision = 0x1p-49 * static_cast<double>(dim + 4);  // rounding of the float64 decision, relative
  int32_t scan = 0;
  float *value = new (std::nothrow) float[static_cast<size_t>(dims)];
  double *wide = new (std::nothrow) double[static_cast<size_t>(dims) * 2];
  if (value == nullptr || wide == nullptr) {
    delete[] value;
    delete[] wide;
    return -1;
  }
  double *source = wide + dims;
  for (int64_t block = begin; block < end; ++block) {
    uint32_t *out = head_codes(head) + block * steps * kCodes;
    GroupBound bound = {0, 0, 0, 0};
    for (int c = 0; c < kCodes; ++c) {
      const int64_t k = block * kCodes + c;
      bool usable = k < head->num_codes;
      double bias = 0;
      if (usable) {
        const int64_t at = head_index * codebook->stride[0] + k * codebook->stride[1];
        if (codebook->dtype == VQK_F32) {
          const float *row = static_cast<const float *>(codebook->data) + at;
          for (int64_t d = 0; d < dim; ++d) source[d] = row[d];
        } else {
          for (int64_t d = 0; d < dim; ++d) source[d] = load_element(codebook->data, codebook->dtype, at + d);
        }
        double scale = head->scale;
        if (metric == VQK_COSINE) {
          double square = 0;  // in the order of the contract: the decision divides by this very number
          for (int64_t d = 0; d < dim; ++d) square += source[d] * source[d];
          head_norms(head)[k] = std::sqrt(square);
          scale = square > 0 ? 1.0 / head_norms(head)[k] : 0.0;
        }
        double largest = 0, length = 0, residual = 0, rounded = 0, second = 0;
#pragma omp simd reduction(max : largest) reduction(+ : length, residual, rounded, second)
        for (int64_t d = 0; d < dim; ++d) {
          const double exact = scale * (source[d] - static_cast<double>(centre[d]));
          const float q = round_operand<DimsPerStep>(static_cast<float>(exact));
          double r = exact - static_cast<double>(q);
          value[d] = q;
          if (split) {
            const float q2 = round_operand<DimsPerStep>(static_cast<float>(r));
            value[dim + d] = q;
            value[2 * dim + d] = q2;
            r -= static_cast<double>(q2);
            second += static_cast<double>(q2) * static_cast<double>(q2);
          }
          largest = std::fabs(source[d]) > largest ? std::fabs(source[d]) : largest;
          length += exact * exact;
          residual += r * r;
          rounded += static_cast<double>(q) * static_cast<double>(q);
        }
        // A code with a NaN or an infinity never wins, except by "dot" against an infinity: leave that to the scan.
        if (!(length < 1e300) || !(residual < 1e300)) {
          bool nan = false, infinite = false;
          for (int64_t d = 0; d < dim; ++d) {
            nan = nan || source[d] != source[d];
            infinite = infinite || std::isinf(source[d]);
          }
          if (!nan && (!infinite || metric == VQK_DOT)) scan = 1;
          usable = false;
        } else if (length > 1e36 || largest > 1e150 || (largest > 0 && largest < 1e-150)) {
          scan = 1;
          usable = false;
        } else {
          bias = metric == VQK_L2 ? length / 2 : 0.0;
          const double reach = std::sqrt(length) * (1 + 0x1p-40);
          // The product x2 . e2 is left out; |x2| <= 2^-8 |x1| by rounding to nearest.
          const double spread = std::sqrt(residual) * (1 + 0x1p-40) + reach * 0x1p-48 +
                                a * (std::sqrt(rounded) + std::sqrt(second)) * (1 + 0x1p-7) + 0x1.02p-8 * std::sqrt(second);
          const double offset = bias * (a + 0x1p-22 + decision) + 0x1p-100;
          const float reach_up = static_cast<float>(reach) * kSlack, spread_up = static_cast<float>(spread) * kSlack;
          const float offset_up = static_cast<float>(offset) * kSlack;
          bound.reach = reach_up > bound.reach ? reach_up : bound.reach;
          bound.spread = spread_up > bound.spread ? spread_up : bound.spread;
          bound.offset = offset_up > bound.offset ? offset_up : bound.offset;
        }
      }
      head_bias(head)[k] = usable ? static_cast<float>(-bias) : -INFINITY;
      for (int64_t d = usable ? (split ? 3 * dim : dim) : 0; d < dims; ++d) value[d] = 0;
      for (int64_t s = 0; s < steps; ++s) {
        uint32_t element;
        if (DimsPerStep == 1)
          element = float_to_bits(value[s]);
        else
          element = (float_to_bits(value[2 * s]) >> 16) | (float_to_bits(value[2 * s + 1]) & 0xffff0000u);
        out[Place::at(steps, c, s)] = element;
      }
    }
    block_bounds[block] = bound;
  }
  delete[] value;
  delete[] wide;
  return scan;
}

struct Interleaved {  // [steps][16 codes]: one vector per step, or one broadcast per code
  VQK_INLINE int64_t at(int64_t, int c, int64_t s) { return s * kCodes + c; }
};

struct Tiled {  // [steps / 16][16 codes][16 steps]: the A operand of an AMX tile product
  VQK_INLINE int64_t at(int64_t, int c, int64_t s) { return (s / 16) * 256 + c * 16 + s % 16; }
};

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

// Rows to screen units, packed [row tile][steps][lanes], with the three numbers per row that the bound needs.
template <class P>
void prepare_rows(Block *block) {
  constexpr int lanes = P::lanes;
  const PackedHead *head = block->head;
  const int64_t dim = head->dim, steps = head->steps, padded = block->padded_rows;
  const bool in_place = rows_in_place(block->x), wide = block->x->dtype == VQK_F64;
  const bool exotic = wide || head->row_scale > 0x1p100 || head->row_scale < 0x1p-100;
  const float scale = static_cast<float>(exotic ? 1.0 : head->row_scale);
  const float *centre = head_centre(head);
  float *values = block->convert;                                                // one row
  uint32_t *elements = reinterpret_cast<uint32_t *>(block->convert + dim + 32);  // [lanes][steps + 16]
  const int64_t pitch = steps + 16;
  const float decision = 0x1p-49f * static_cast<float>(dim + 4), floor = 0x1p-124f * static_cast<float>(dim + 32);

  for (int64_t tile = 0; tile < padded; tile += lanes) {
    const int64_t end = tile + lanes < block->rows ? tile + lanes : block->rows;
    if (!in_place && tile < end) copy_rows<P>(block, tile, end);
    for (int64_t r = tile; r < tile + lanes; ++r) {
      uint32_t *out = elements + (r - tile) * pitch;
      float square = 0, error = 0;
      block->row_scan[r] = 0;
      if (r < block->rows) {
        if (exotic) {
          for (int64_t d = 0; d < dim; ++d) {
            const double v = wide ? double_row(block, r)[d] : static_cast<double>(float_row(block, r)[d]);
            values[d] = static_cast<float>(head->row_scale * (v - static_cast<double>(centre[d])));
          }
          P::quantise(values, block->zeros, 1.0f, dim, out, &square, &error);
        } else {
          P::quantise(float_row(block, r), centre, scale, dim, out, &square, &error);
        }
        for (int64_t s = P::used_steps(dim); s < steps; ++s) out[s] = 0;
        const float length = std::sqrt(square + floor) * kSlack;
        // 2^-23 |x'|: rounding of x - centre and of the conversion to float32.
        const float residual = std::sqrt(error + floor) * kSlack + 0x1p-23f * length;
        block->row_length[r] = length;
        block->row_residual[r] = residual;
        block->row_offset[r] = decision * length * length;
        if (!(length < 1e18f) || !(length * head->reach < 1e36f)) block->row_scan[r] = 1;
      }
      if (r >= block->rows || block->row_scan[r]) {
        for (int64_t s = 0; s < steps; ++s) out[s] = 0;
        block->row_length[r] = block->row_residual[r] = block->row_offset[r] = 0;
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
