// How codes become rows of any layout and dtype, block by block: what lookup and quantize_output have in common.
#ifndef VQK_CPU_GATHER_H
#define VQK_CPU_GATHER_H

#include "cpu/elements.h"

namespace vqk {
namespace gather {

constexpr int64_t block_rows = 256;  // long runs in every plane of a channel-first output
constexpr int64_t tile_dims = 16;    // planes that are written at a time: a cache line of every code
constexpr int64_t tile_rows = 32;

// Blocks of rows of (H, B, S, D): they run along S.
struct Blocks {
  explicit Blocks(const vqk_rows &rows)
      : items(rows.size[1]),
        rows(rows.size[2]),
        per_item((rows.size[2] + block_rows - 1) / block_rows),
        count(rows.size[0] * rows.size[1] * per_item) {}

  // Blocks per work item, so that one is worth handing to another thread.
  int64_t grain(int64_t dim) const {
    return std::max<int64_t>(1, row_grain(dim) / std::max<int64_t>(1, std::min(block_rows, rows)));
  }

  int64_t items, rows, per_item, count;
};

struct Place {
  Place(const Blocks &blocks, int64_t block)
      : head(block / (blocks.items * blocks.per_item)),
        item(block / blocks.per_item % blocks.items),
        first(block % blocks.per_item * block_rows),
        count(std::min(block_rows, blocks.rows - first)),
        number((head * blocks.items + item) * blocks.rows + first) {}

  template <class T>
  auto *of(const vqk_rows &x) const {
    return pointer<T>(x.data) + head * x.stride[0] + item * x.stride[1] + first * x.stride[2];
  }

  int64_t head, item, first, count;
  int64_t number;  // of the first row, where rows are contiguous
};

// Where the codes of a block lie. "No code" reads one zero over and over.
template <class In>
struct Codes {
  using raw = typename In::raw;

  Codes(const vqk_codes &codebook, const int64_t *indices, const Place &place, IndexCheck &check) : count(place.count) {
    const raw *codes = pointer<In>(codebook.data) + place.head * codebook.stride[0];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = indices[place.number + i];
      const bool code = check.ok(index, place.number + i) && index >= 0;
      source[i] = code ? codes + index * codebook.stride[1] : &none;
      step[i] = code ? codebook.stride[2] : 0;
    }
  }
  bool coded(int64_t i) const { return source[i] != &none; }

  static constexpr raw none{};
  int64_t count;
  const raw *source[block_rows];
  int64_t step[block_rows];
};

// Codes to rows whose dims lie together.
template <class Out, class In>
void write_rows(const Codes<In> &codes, int64_t D, typename Out::raw *target, int64_t row_step) {
  for (int64_t i = 0; i < codes.count; ++i) {
    const auto *from = codes.source[i];
    const int64_t step = codes.step[i];
    auto *to = target + i * row_step;
    if (!codes.coded(i))
      std::fill(to, to + D, typename Out::raw{});
    else if (std::is_same<In, Out>::value && step == 1)
      std::memcpy(to, from, static_cast<size_t>(D) * sizeof *to);
    else if (step == 1)
      for (int64_t d = 0; d < D; ++d) to[d] = Out::put(In::get(from[d]));
    else
      for (int64_t d = 0; d < D; ++d) to[d] = Out::put(In::get(from[d * step]));
  }
}

// What a tile is made of: 16-bit floats are turned in float32, in registers, and rounded when they are written.
template <class Out>
using Tile = typename std::conditional<std::is_same<Out, F64>::value, F64, F32>::type;

// Up to `width` dims of 32 codes, from `first` on, turned into a tile from its row `row` on by way of `gathered`.
template <int64_t width, class T, class In>
VQK_INLINE void fill_tile(const Codes<In> &codes, int64_t row, int64_t first, int64_t dims, typename T::raw *__restrict gathered,
                          typename T::raw *__restrict tile) {
  for (int64_t i = 0; i < std::min(tile_rows, codes.count - row); ++i) {
    const int64_t step = codes.step[row + i];
    const auto *from = codes.source[row + i] + first * step;
    auto *to = gathered + i * width;
    if (step == 1 && dims == width)
      for (int64_t d = 0; d < width; ++d) to[d] = T::put(In::get(from[d]));
    else if (step == 1 && std::is_same<In, T>::value)
      std::memcpy(to, from, static_cast<size_t>(dims) * sizeof *to);
    else
      for (int64_t d = 0; d < dims; ++d) to[d] = T::put(In::get(from[d * step]));
  }
  transpose<tile_rows, width>(gathered, tile + row, block_rows);
}

// Codes to planes: a cache line of every code at a time, transposed in a tile, then one long run per plane.
// `visit(first, dims, tile)` sees each tile, (dims, block_rows), from dim `first` on.
template <class Out, class In, class Visit>
void write_planes(const Codes<In> &codes, int64_t D, typename Out::raw *target, int64_t row_step, int64_t dim_step,
                  const Visit &visit) {
  using T = Tile<Out>;
  using raw = typename T::raw;
  raw gathered[tile_rows * tile_dims] = {}, tile[tile_dims * block_rows];
  const auto convert = [](raw value) {
    if constexpr (std::is_same<T, Out>::value)
      return value;
    else
      return Out::put(T::get(value));
  };
  for (int64_t first = 0; first < D; first += tile_dims) {
    const int64_t dims = std::min(tile_dims, D - first);
    for (int64_t row = 0; row < codes.count; row += tile_rows)
      if (dims <= tile_dims / 2)
        fill_tile<tile_dims / 2, T>(codes, row, first, dims, gathered, tile);
      else
        fill_tile<tile_dims, T>(codes, row, first, dims, gathered, tile);
    visit(first, dims, static_cast<const raw *>(tile));
    for (int64_t d = 0; d < dims; ++d) {
      auto *to = target + (first + d) * dim_step;
      const raw *from = tile + d * block_rows;
      if (std::is_same<T, Out>::value && row_step == 1)
        std::copy(from, from + codes.count, to);
      else if (row_step == 1)
        for (int64_t i = 0; i < codes.count; ++i) to[i] = convert(from[i]);
      else
        for (int64_t i = 0; i < codes.count; ++i) to[i * row_step] = convert(from[i]);
    }
  }
}

// Codes to rows of any layout.
template <class Out, class In>
void write(const Codes<In> &codes, const Place &place, const vqk_rows &out) {
  const int64_t D = out.size[3];
  auto *target = place.of<Out>(out);
  if (out.stride[3] == 1)
    write_rows<Out>(codes, D, target, out.stride[2]);
  else
    write_planes<Out>(codes, D, target, out.stride[2], out.stride[3], [](int64_t, int64_t, const typename Tile<Out>::raw *) {});
}

}  // namespace gather
}  // namespace vqk

#endif
