#include "matrix.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")  // most of the time goes here: vectorise
#endif

namespace ptx {

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
