#include "matrix.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")  // most of the time goes here: vectorise
#endif

namespace ptx {
namespace {

template <int type, class Word>
void granule(const unsigned char *bytes, double *to, int step) {
  constexpr int count = 16 / sizeof(Word);
  Word words[count];
  double values[count];
  std::memcpy(words, bytes, 16);
  for (int i = 0; i < count; ++i) values[i] = decode(type, words[i]);
  for (int i = 0; i < count; ++i) to[i * step] = values[i];
}

}  // namespace

void decode_granule(int element, const unsigned char *bytes, double *to, int step) {
  switch (element) {
    case f16: return granule<f16, uint16_t>(bytes, to, step);
    case bf16: return granule<bf16, uint16_t>(bytes, to, step);
    case tf32: return granule<tf32, uint32_t>(bytes, to, step);
    case s8: return granule<s8, uint8_t>(bytes, to, step);
    default: return granule<u8, uint8_t>(bytes, to, step);
  }
}

void multiply(int rows, int columns, int depth, int step, int accumulator, const double *a, const double *b, double *c) {
  for (int i = 0; i < rows; ++i, a += depth, c += columns) {
    for (int from = 0; from < depth; from += step) {
      for (int k = from; k < from + step; ++k) {
        const double x = a[k];
        const double *row = b + k * columns;
        for (int j = 0; j < columns; ++j) c[j] += x * row[j];
      }
      if (accumulator == f32)
        for (int j = 0; j < columns; ++j) c[j] = toward_zero(c[j]);
    }
  }
}

bool decode_matrix(Instruction &in) { return decode_warp_matrix(in) || decode_group_matrix(in); }

}  // namespace ptx
