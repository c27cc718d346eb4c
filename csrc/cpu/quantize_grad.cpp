// quantize_grad: the gradient of a quantizer's input, dz = T(grad) + c * (z - e), in one pass over any layout.
//
// Channel-first maps take a path of their own unless rows must be reduced (rotation): only the codes are transposed,
// tile by tile, and everything else streams through as it lies.
#include <cmath>

#include "cpu/elements.h"

namespace vqk {
namespace {

constexpr int64_t lanes = 32;         // rows of a block, or of a transposed tile
constexpr int64_t tile_dims = 16;     // dims of a transposed tile
constexpr int64_t column_rows = 256;  // rows of a channel-first block: long runs in every plane, few planes at a time

// A norm below this counts as this (Fifty et al. 2024, the authors' implementation).
constexpr double smallest_norm = 1e-6;

struct Block {
  int64_t head, item, first, count;
};

template <class T>
auto *at(const vqk_rows &x, const Block &block) {
  return pointer<T>(x.data) + block.head * x.stride[0] + block.item * x.stride[1] + block.first * x.stride[2];
}

// Sixteen partial sums: a fixed order of summation, and no wait for the sum before. In vectors by hand, because
// compilers do not vectorise a float reduction.
template <class V>
struct Lanes {
  static constexpr int64_t width = 16;
  typedef V vector __attribute__((vector_size(16 * sizeof(V))));

  // By reference: how wide vectors are returned depends on the instruction set.
  static void load(const V *p, vector &v) { std::memcpy(&v, p, sizeof v); }

  static V sum(const vector &v) {
    V part[8];
    for (int i = 0; i < 8; ++i) part[i] = v[i] + v[i + 8];
    return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
  }
};

// out = lam * (g - 2 (g.w) w + 2 (g.e^) z^) + c * (z - e)
template <class V>
VQK_CLONES void rotate_back(const V *g, const V *z, const V *e, int64_t D, V c, V *__restrict out) {
  using L = Lanes<V>;
  const V tiny = static_cast<V>(smallest_norm);
  const int64_t whole = D - D % L::width;

  typename L::vector zz_lanes{}, ee_lanes{};
  for (int64_t d = 0; d < whole; d += L::width) {
    typename L::vector zd, ed;
    L::load(z + d, zd);
    L::load(e + d, ed);
    zz_lanes += zd * zd;
    ee_lanes += ed * ed;
  }
  V zz = L::sum(zz_lanes), ee = L::sum(ee_lanes);
  for (int64_t d = whole; d < D; ++d) {
    zz += z[d] * z[d];
    ee += e[d] * e[d];
  }
  const V z_norm = std::max(std::sqrt(zz), tiny), e_norm = std::max(std::sqrt(ee), tiny);
  const V z_scale = 1 / z_norm, e_scale = 1 / e_norm;

  // u = z^ + e^, so that w = u / |u|
  typename L::vector uu_lanes{}, gu_lanes{}, ge_lanes{};
  for (int64_t d = 0; d < whole; d += L::width) {
    typename L::vector gd, zd, ed;
    L::load(g + d, gd);
    L::load(z + d, zd);
    L::load(e + d, ed);
    const typename L::vector e_unit = ed * e_scale, u = zd * z_scale + e_unit;
    uu_lanes += u * u;
    gu_lanes += gd * u;
    ge_lanes += gd * e_unit;
  }
  V uu = L::sum(uu_lanes), gu = L::sum(gu_lanes), ge = L::sum(ge_lanes);
  for (int64_t d = whole; d < D; ++d) {
    const V e_unit = e[d] * e_scale, u = z[d] * z_scale + e_unit;
    uu += u * u;
    gu += g[d] * u;
    ge += g[d] * e_unit;
  }

  const V u_norm = std::max(std::sqrt(uu), tiny), scale = e_norm / z_norm;
  const V along_u = 2 * gu / u_norm / u_norm, along_z = 2 * ge;
  for (int64_t d = 0; d < D; ++d) {
    const V z_unit = z[d] * z_scale, u = z_unit + e[d] * e_scale;
    out[d] = scale * (g[d] - along_u * u + along_z * z_unit) + c * (z[d] - e[d]);
  }
}

// out = g + c * (z - e); without g for "none".
template <class V>
VQK_CLONES void pass_through(const V *g, const V *z, const V *e, int64_t D, V c, V *__restrict out) {
  if (g == nullptr)
    for (int64_t d = 0; d < D; ++d) out[d] = c * (z[d] - e[d]);
  else
    for (int64_t d = 0; d < D; ++d) out[d] = g[d] + c * (z[d] - e[d]);
}

// The same for a block of channel-first rows; `codes` holds one row of the codebook each, nullptr for "no code".
template <class Z, class V = typename Z::value>
VQK_CLONES void pass_through_columns(const typename Z::raw *g, int64_t g_step, const typename Z::raw *z, int64_t z_step,
                                     const V *const *codes, bool masked, int64_t count, int64_t D, V c,
                                     typename Z::raw *__restrict out, int64_t out_step) {
  // Codes lie anywhere: a cache line of each is collected first, then transposed in registers. Planes of a power of two
  // share their cache sets, so every one is visited once per block, for a long run.
  V gathered[lanes * tile_dims] = {}, tile[tile_dims * column_rows];
  for (int64_t first = 0; first < D; first += tile_dims) {
    const int64_t dims = std::min(tile_dims, D - first);
    for (int64_t row = 0; row < count; row += lanes) {
      for (int64_t i = 0; i < std::min(lanes, count - row); ++i) {
        if (codes[row + i] == nullptr) continue;
        if (dims == tile_dims)
          std::memcpy(gathered + i * tile_dims, codes[row + i] + first, tile_dims * sizeof(V));
        else
          std::copy(codes[row + i] + first, codes[row + i] + first + dims, gathered + i * tile_dims);
      }
      transpose<lanes, tile_dims>(gathered, tile + row, column_rows);
    }
    for (int64_t d = 0; d < dims; ++d) {
      const auto *zd = z + (first + d) * z_step;
      const V *e = tile + d * column_rows;
      auto *__restrict to = out + (first + d) * out_step;
      if (g == nullptr) {
        for (int64_t i = 0; i < count; ++i) to[i] = Z::put(c * (Z::get(zd[i]) - e[i]));
      } else {
        const auto *gd = g + (first + d) * g_step;
        for (int64_t i = 0; i < count; ++i) to[i] = Z::put(Z::get(gd[i]) + c * (Z::get(zd[i]) - e[i]));
      }
      for (int64_t i = 0; i < count && masked; ++i)
        if (codes[i] == nullptr) to[i] = typename Z::raw{};
    }
  }
}

// Rows of a block as V, one after another: where they lie if they already are, else in `buffer`.
template <class T, class V>
VQK_CLONES const V *read_rows(const vqk_rows &x, const Block &block, V *buffer, int64_t &row_step) {
  const int64_t D = x.size[3], step = x.stride[2], dim_step = x.stride[3];
  const auto *source = at<T>(x, block);
  if constexpr (std::is_same<typename T::raw, V>::value) {
    if (dim_step == 1) {
      row_step = step;
      return source;
    }
  }
  row_step = D;
  for (int64_t first = 0; first < D; first += tile_dims) {
    const int64_t last = std::min(first + tile_dims, D);
    if (dim_step == 1)
      for (int64_t i = 0; i < block.count; ++i)
        for (int64_t d = first; d < last; ++d) buffer[i * D + d] = static_cast<V>(T::get(source[i * step + d]));
    else
      for (int64_t d = first; d < last; ++d)
        for (int64_t i = 0; i < block.count; ++i) buffer[i * D + d] = static_cast<V>(T::get(source[i * step + d * dim_step]));
  }
  return buffer;
}

template <class T, class V>
VQK_CLONES void write_rows(const V *__restrict rows, const vqk_rows &out, const Block &block) {
  const int64_t D = out.size[3], step = out.stride[2], dim_step = out.stride[3];
  auto *target = at<T>(out, block);
  if (dim_step == 1) {
    for (int64_t i = 0; i < block.count; ++i)
      for (int64_t d = 0; d < D; ++d) target[i * step + d] = T::put(rows[i * D + d]);
  } else {
    for (int64_t d = 0; d < D; ++d)
      for (int64_t i = 0; i < block.count; ++i) target[i * step + d * dim_step] = T::put(rows[i * D + d]);
  }
}

// One code as V: where it lies if it already is, else in `buffer`.
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
  const int64_t H = z.size[0], B = z.size[1], S = z.size[2], D = z.size[3];
  const V c = static_cast<V>(commitment);
  const bool with_grad = gradient != VQK_NONE;
  const bool columns = gradient != VQK_ROTATION && z.stride[2] == 1 && out.stride[2] == 1 && out.stride[3] != 1 &&
                       (!with_grad || (grad.stride[2] == 1 && grad.dtype == z.dtype));
  const int64_t block_rows = columns ? column_rows : lanes, blocks = (S + block_rows - 1) / block_rows;
  // Rows that are written as they are need no copy of the result.
  const bool direct = std::is_same<typename Z::raw, V>::value && out.stride[3] == 1;
  IndexCheck check(codebook.size[1]);
  std::atomic<bool> failed{false};
  parallel_for(0, H * B * blocks, std::max<int64_t>(1, row_grain(D) / block_rows), [&](int64_t begin, int64_t end) {
    const auto buffer = allocate<V>((columns ? column_rows : 4 * lanes) * D);
    if (!buffer) {
      failed = true;
      return;
    }
    // Codes that need conversion first, then three blocks of rows.
    V *code_rows = buffer.get(), *g_rows = code_rows + lanes * D, *z_rows = g_rows + lanes * D, *result = z_rows + lanes * D;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * block_rows;
      const Block block{i / (B * blocks), i / blocks % B, first, std::min(block_rows, S - first)};
      const int64_t row = (block.head * B + block.item) * S + first;
      const V *codes[column_rows];
      bool masked = false;
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t index = indices[row + j];
        const bool coded = check.ok(index, row + j) && index >= 0;
        codes[j] = coded ? read_code<V>(codebook, block.head, index, code_rows + j * D) : nullptr;
        masked |= !coded;
      }
      if (columns) {
        pass_through_columns<Z>(with_grad ? at<Z>(grad, block) : nullptr, grad.stride[3], at<Z>(z, block), z.stride[3], codes,
                                masked, block.count, D, c, at<Z>(out, block), out.stride[3]);
        continue;
      }
      int64_t g_step = 0, z_step = 0, out_step = D;
      const V *gs = nullptr, *zs = read_rows<Z, V>(z, block, z_rows, z_step);
      if (with_grad)
        gs = with_dtype(grad.dtype, [&](auto type) { return read_rows<decltype(type), V>(grad, block, g_rows, g_step); });
      V *target = result;
      if constexpr (std::is_same<typename Z::raw, V>::value) {
        if (direct) {
          target = at<Z>(out, block);
          out_step = out.stride[2];
        }
      }
      for (int64_t j = 0; j < block.count; ++j) {
        V *to = target + j * out_step;
        if (codes[j] == nullptr)
          std::fill(to, to + D, V{});
        else if (gradient == VQK_ROTATION)
          rotate_back<V>(gs + j * g_step, zs + j * z_step, codes[j], D, c, to);
        else
          pass_through<V>(with_grad ? gs + j * g_step : nullptr, zs + j * z_step, codes[j], D, c, to);
      }
      if (!direct) write_rows<Z, V>(result, out, block);
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
