// quantize_grad: the gradient of a quantizer's input, dz = T(grad) + c * (z - e), in one pass over any layout.
#include <cmath>

#include "cpu/elements.h"

namespace vqk {
namespace {

constexpr int64_t lanes = 16;  // rows that are worked on side by side

// |norm| below this counts as this (Fifty et al. 2024, the authors' implementation).
constexpr double smallest_norm = 1e-6;

struct Block {
  int64_t head, item, first, count, row;
};

// Three dot products at a time in eight lanes: a fixed order, and no wait for the previous sum.
template <class V, class F>
void reduce(int64_t D, V (&result)[3], const F &terms) {
  constexpr int width = 8;
  V a[width] = {}, b[width] = {}, c[width] = {};
  int64_t d = 0;
  for (; d + width <= D; d += width)
    for (int j = 0; j < width; ++j) terms(d + j, a[j], b[j], c[j]);
  for (int j = 0; d < D; ++d, ++j) terms(d, a[j], b[j], c[j]);
  const auto total = [](const V(&v)[width]) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); };
  result[0] = total(a);
  result[1] = total(b);
  result[2] = total(c);
}

// out = lam * (g - 2 (g.w) w + 2 (g.e^) z^) + c * (z - e); out may be g or z.
template <class V>
void rotate_back(const V *g, const V *z, const V *e, int64_t D, V c, V *out) {
  const V tiny = static_cast<V>(smallest_norm);
  V sums[3];
  reduce<V>(D, sums, [=](int64_t d, V &zz, V &ee, V &) {
    zz += z[d] * z[d];
    ee += e[d] * e[d];
  });
  const V z_norm = std::max(std::sqrt(sums[0]), tiny), e_norm = std::max(std::sqrt(sums[1]), tiny);
  const V z_scale = 1 / z_norm, e_scale = 1 / e_norm;
  reduce<V>(D, sums, [=](int64_t d, V &uu, V &gu, V &ge) {
    const V e_unit = e[d] * e_scale, u = z[d] * z_scale + e_unit;
    uu += u * u;
    gu += g[d] * u;
    ge += g[d] * e_unit;
  });
  const V u_norm = std::max(std::sqrt(sums[0]), tiny), scale = e_norm / z_norm;
  const V along_u = 2 * sums[1] / u_norm / u_norm, along_z = 2 * sums[2];
  for (int64_t d = 0; d < D; ++d) {
    const V z_unit = z[d] * z_scale, u = z_unit + e[d] * e_scale;
    out[d] = scale * (g[d] - along_u * u + along_z * z_unit) + c * (z[d] - e[d]);
  }
}

// Rows of a block as V, one after another: where they lie if they already are, else in `buffer`.
template <class T, class V>
const V *read_rows(const vqk_rows &x, const Block &at, V *buffer, int64_t &row_step) {
  const int64_t D = x.size[3], step = x.stride[2], dim_step = x.stride[3];
  const auto *source = pointer<T>(x.data) + at.head * x.stride[0] + at.item * x.stride[1] + at.first * step;
  if constexpr (std::is_same<typename T::raw, V>::value) {
    if (dim_step == 1) {
      row_step = step;
      return source;
    }
  }
  row_step = D;
  if (dim_step == 1) {
    for (int64_t i = 0; i < at.count; ++i)
      for (int64_t d = 0; d < D; ++d) buffer[i * D + d] = static_cast<V>(T::get(source[i * step + d]));
  } else {
    for (int64_t d = 0; d < D; ++d)
      for (int64_t i = 0; i < at.count; ++i) buffer[i * D + d] = static_cast<V>(T::get(source[i * step + d * dim_step]));
  }
  return buffer;
}

template <class T, class V>
void write_rows(const V *rows, const vqk_rows &out, const Block &at) {
  const int64_t D = out.size[3], step = out.stride[2], dim_step = out.stride[3];
  auto *target = pointer<T>(out.data) + at.head * out.stride[0] + at.item * out.stride[1] + at.first * step;
  if (dim_step == 1) {
    for (int64_t i = 0; i < at.count; ++i)
      for (int64_t d = 0; d < D; ++d) target[i * step + d] = T::put(rows[i * D + d]);
  } else {
    for (int64_t d = 0; d < D; ++d)
      for (int64_t i = 0; i < at.count; ++i) target[i * step + d * dim_step] = T::put(rows[i * D + d]);
  }
}

template <class V>
const V *read_code(const vqk_codes &codebook, int64_t head, int64_t index, V *buffer) {
  const int64_t D = codebook.size[2], step = codebook.stride[2];
  const int64_t start = head * codebook.stride[0] + index * codebook.stride[1];
  return with_dtype(codebook.dtype, [&](auto dtype) -> const V * {
    using T = decltype(dtype);
    const auto *source = pointer<T>(codebook.data) + start;
    if constexpr (std::is_same<typename T::raw, V>::value) {
      if (step == 1) return source;
    }
    for (int64_t d = 0; d < D; ++d) buffer[d] = static_cast<V>(T::get(source[d * step]));
    return buffer;
  });
}

template <class Z>
int32_t run(const vqk_rows &grad, const vqk_rows &z, const vqk_codes &codebook, const int64_t *indices, double commitment,
            int32_t gradient, const vqk_rows &out) {
  using V = typename Z::value;
  const int64_t H = z.size[0], B = z.size[1], S = z.size[2], D = z.size[3], blocks = (S + lanes - 1) / lanes;
  const V c = static_cast<V>(commitment);
  IndexCheck check(codebook.size[1]);
  std::atomic<bool> failed{false};
  parallel_for(0, H * B * blocks, std::max<int64_t>(1, row_grain(D) / lanes), [&](int64_t begin, int64_t end) {
    const auto buffer = allocate<V>((3 * lanes + 1) * D);
    if (!buffer) {
      failed = true;
      return;
    }
    V *g_rows = buffer.get(), *z_rows = g_rows + lanes * D, *result = z_rows + lanes * D, *code = result + lanes * D;
    for (int64_t block = begin; block < end; ++block) {
      Block at{block / (B * blocks), block / blocks % B, block % blocks * lanes, 0, 0};
      at.count = std::min(lanes, S - at.first);
      at.row = (at.head * B + at.item) * S + at.first;
      int64_t g_step = 0, z_step = 0;
      const V *zs = read_rows<Z, V>(z, at, z_rows, z_step);
      const V *gs = nullptr;
      if (gradient != VQK_NONE)
        gs = with_dtype(grad.dtype, [&](auto type) { return read_rows<decltype(type), V>(grad, at, g_rows, g_step); });
      for (int64_t i = 0; i < at.count; ++i) {
        const int64_t index = indices[at.row + i];
        V *__restrict to = result + i * D;
        if (!check.ok(index, at.row + i) || index < 0) {
          std::fill(to, to + D, V{});
          continue;
        }
        const V *__restrict e = read_code<V>(codebook, at.head, index, code);
        const V *__restrict zi = zs + i * z_step;
        const V *__restrict gi = gs + i * g_step;
        if (gradient == VQK_ROTATION)
          rotate_back(gi, zi, e, D, c, to);
        else if (gradient == VQK_NONE)
          for (int64_t d = 0; d < D; ++d) to[d] = c * (zi[d] - e[d]);
        else
          for (int64_t d = 0; d < D; ++d) to[d] = gi[d] + c * (zi[d] - e[d]);
      }
      write_rows<Z, V>(result, out, at);
    }
  });
  return failed ? out_of_memory("quantize_grad") : check.status("quantize_grad", indices);
}

}  // namespace
}  // namespace vqk

int32_t vqk_cpu_quantize_grad(const vqk_rows *grad, const vqk_rows *z, const vqk_codes *codebook, const int64_t *indices,
                              double commitment, int32_t gradient, const vqk_rows *out) {
  using namespace vqk;
  const vqk_rows inner = with_long_rows(*grad), input = with_long_rows(*z), result = with_long_rows(*out);
  return with_dtype(
      z->dtype, [&](auto dtype) { return run<decltype(dtype)>(inner, input, *codebook, indices, commitment, gradient, result); });
}
