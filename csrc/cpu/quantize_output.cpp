// quantize_output: codes as rows, both losses and their weight, in one pass over any layout.
//
// Blocks are lookup's. A row's |z - e|^2 is given, or summed in 16 lanes, dim d in lane d % 16, whatever the layout is;
// rows are summed in float64, in 8 lanes per block, then blocks and chunks of blocks in order. Chunks depend on the sizes
// alone, so the number of threads changes no bit.
#include "cpu/gather.h"

namespace vqk {
namespace {

using gather::block_rows;
constexpr int64_t lanes = 16;
static_assert(lanes == gather::tile_dims, "a tile of codes has one dim per lane");

template <class V, int64_t width>
struct Vector {
  typedef V type __attribute__((vector_size(width * sizeof(V))));
};

// Dims d, d + 1, .. of a row.
template <class T, class V>
VQK_INLINE void load(const typename T::raw *row, int64_t step, typename Vector<V, lanes>::type &to) {
  V value[lanes];
  if (step == 1)
    for (int64_t l = 0; l < lanes; ++l) value[l] = static_cast<V>(T::get(row[l]));
  else
    for (int64_t l = 0; l < lanes; ++l) value[l] = static_cast<V>(T::get(row[l * step]));
  std::memcpy(&to, value, sizeof to);
}

// errors[i] = |z_i - e_i|^2 of rows with any strides.
template <class Z, class E, class V = typename Z::value>
VQK_CLONES void row_errors(const typename Z::raw *z, int64_t row_step, int64_t dim_step, const gather::Codes<E> &codes, int64_t D,
                           V *errors) {
  const int64_t whole = D - D % lanes;
  for (int64_t i = 0; i < codes.count; ++i) {
    const auto *row = z + i * row_step;
    const auto *code = codes.source[i];
    const int64_t code_step = codes.step[i];
    V part[lanes] = {};
    if (whole > 0) {
      typename Vector<V, lanes>::type sum{}, a, b;
      for (int64_t d = 0; d < whole; d += lanes) {
        load<Z, V>(row + d * dim_step, dim_step, a);
        load<E, V>(code + d * code_step, code_step, b);
        a -= b;
        sum += a * a;
      }
      std::memcpy(part, &sum, sizeof sum);
    }
    for (int64_t d = whole; d < D; ++d) {
      const V error = static_cast<V>(Z::get(row[d * dim_step])) - static_cast<V>(E::get(code[d * code_step]));
      part[d - whole] += error * error;
    }
    for (int64_t half = lanes / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) part[l] += part[l + half];
    errors[i] = part[0];
  }
}

// sums[l][i] += (z_i - e_i)^2 in the dim of lane l, of rows that lie side by side in every plane.
template <class Z, class V = typename Z::value>
VQK_CLONES void add_planes(const typename Z::raw *z, int64_t dim_step, const V *tile, int64_t dims, int64_t count,
                           V *__restrict sums) {
  for (int64_t d = 0; d < dims; ++d) {
    const auto *plane = z + d * dim_step;
    const V *e = tile + d * block_rows;
    V *__restrict sum = sums + d * block_rows;
    for (int64_t i = 0; i < count; ++i) {
      const V error = Z::get(plane[i]) - e[i];
      sum[i] += error * error;
    }
  }
}

template <class V>
VQK_CLONES void join_lanes(V *__restrict sums, int64_t count) {
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l)
      for (int64_t i = 0; i < count; ++i) sums[l * block_rows + i] += sums[(l + half) * block_rows + i];
}

template <class V>
VQK_CLONES double add_up(const V *errors, int64_t count) {
  constexpr int64_t width = 8;
  double part[width] = {};
  Vector<double, width>::type sum{};
  typename Vector<V, width>::type narrow;
  for (int64_t i = 0; i + width <= count; i += width) {
    std::memcpy(&narrow, errors + i, sizeof narrow);
    sum += __builtin_convertvector(narrow, Vector<double, width>::type);
  }
  std::memcpy(part, &sum, sizeof sum);
  for (int64_t i = count - count % width; i < count; ++i) part[i % width] += static_cast<double>(errors[i]);
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) part[l] += part[l + half];
  return part[0];
}

// What a chunk of blocks, or all of them, adds to the loss.
struct Sum {
  double total = 0;
  int64_t rows = 0;

  // Rows without a code do not count, whatever their error is.
  template <class V, class E>
  void add(const V *given, const gather::Codes<E> &codes) {
    V errors[block_rows];
    for (int64_t i = 0; i < codes.count; ++i) {
      errors[i] = codes.coded(i) ? given[i] : 0;
      rows += codes.coded(i);
    }
    total += add_up(errors, codes.count);
  }
};

// Values of one block, measured on the way.
template <class Z, class E>
void measure(const vqk_rows &z, const gather::Codes<E> &codes, const gather::Place &place, const vqk_rows &out, Sum &sum) {
  using V = typename Z::value;
  const int64_t D = out.size[3];
  const auto *rows = place.of<Z>(z);
  if (out.stride[3] != 1 && z.stride[3] != 1 && z.stride[2] == 1) {
    // Tiles have all digits of the codes that count, a half-precision output has not.
    V sums[lanes * block_rows] = {};
    const auto add = [&](int64_t first, int64_t dims, const V *tile) {
      add_planes<Z>(rows + first * z.stride[3], z.stride[3], tile, dims, codes.count, sums);
    };
    gather::write_planes<Z>(codes, D, place.of<Z>(out), out.stride[2], out.stride[3], add);
    join_lanes(sums, codes.count);
    sum.add(sums, codes);
    return;
  }
  V errors[block_rows];
  row_errors<Z>(rows, z.stride[2], z.stride[3], codes, D, errors);
  sum.add(errors, codes);
  gather::write<Z>(codes, place, out);
}

template <class Z, class E>
int32_t run(const vqk_rows *z, const vqk_codes &codebook, const int64_t *indices, const float *distance, const vqk_rows &out,
            IndexCheck &check, Sum &all) {
  const gather::Blocks blocks(out);
  const int64_t chunk = blocks.grain(out.size[3]), chunks = (blocks.count + chunk - 1) / chunk;
  const auto sums = allocate<Sum>(chunks);
  if (!sums) return out_of_memory("quantize_output");
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t block = i * chunk; block < std::min((i + 1) * chunk, blocks.count); ++block) {
        const gather::Place place(blocks, block);
        const gather::Codes<E> codes(codebook, indices, place, check);
        if (distance == nullptr) {
          measure<Z>(*z, codes, place, out, sums[i]);
        } else {
          sums[i].add(distance + place.number, codes);
          gather::write<Z>(codes, place, out);
        }
      }
  });
  for (int64_t i = 0; i < chunks; ++i) {
    all.total += sums[i].total;
    all.rows += sums[i].rows;
  }
  return VQK_OK;
}

}  // namespace
}  // namespace vqk

int32_t vqk_cpu_quantize_output(const vqk_rows *z, const vqk_codes *codebook, const int64_t *indices, const float *distance,
                                const vqk_rows *out, void *codebook_loss, void *commitment_loss, double *weight) {
  using namespace vqk;
  IndexCheck check(codebook->size[1]);
  const vqk_rows rows = z == nullptr ? vqk_rows{} : with_long_rows(*z), result = with_long_rows(*out);
  Sum sum;
  const int32_t status = with_dtype(out->dtype, [&](auto of) {
    return with_dtype(codebook->dtype, [&](auto in) {
      return run<decltype(of), decltype(in)>(&rows, *codebook, indices, distance, result, check, sum);
    });
  });
  if (status != VQK_OK) return status;
  *weight = 1.0 / std::max(static_cast<double>(sum.rows) * static_cast<double>(out->size[3]), 1.0);
  for (void *loss : {codebook_loss, commitment_loss})
    store_element(loss, out->dtype == VQK_F64 ? VQK_F64 : VQK_F32, 0, sum.total * *weight);
  return check.status("quantize_output", indices);
}
