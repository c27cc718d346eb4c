// Matrices spread over the 32 lanes of a warp: ldmatrix, stmatrix, movmatrix and mma.sync.
#include <algorithm>
#include <array>
#include <cstdio>

#include "matrix.h"
#include "races.h"

namespace ptx {
namespace {

// False: some lanes have not come yet. These instructions are undefined for a warp that has lost lanes.
bool whole(Warp &w, const Instruction &in, Lanes lanes) {
  if (w.live != ~Lanes{0}) w.fail(in, -1, "not all 32 lanes of the warp are there");
  return lanes == w.live;
}

const Operand &part(const Operand &o, int i) { return o.kind == Operand::vector ? o.items[static_cast<size_t>(i)] : o; }
int parts(const Operand &o) { return o.kind == Operand::vector ? static_cast<int>(o.items.size()) : 1; }

// ---- 8 x 8 matrices of 16 bits: lane l has the elements 2 * (l % 4) and the next of row l / 4 ----

using Rows = std::array<std::array<uint16_t, 8>, 8>;

enum Detail { matrices, transposed, address, registers };

Outcome ldmatrix(Warp &w, const Instruction &in, Lanes lanes) {
  if (!whole(w, in, lanes)) return Outcome::wait;
  const Operand &to = in.operands[0];
  for (int m = 0; m < in.detail[matrices]; ++m) {
    Rows rows;
    for (int r = 0; r < 8; ++r) {
      const int lane = m * 8 + r;  // the lane that names this row's address
      const unsigned char *from = w.block.shared_at(w, in, lane, w.address(in.operands[1], lane), 16, 16);
      if (w.block.races) w.block.races->access(w, in, lane, from, 16, Races::reads);
      std::memcpy(rows[static_cast<size_t>(r)].data(), from, 16);
    }
    for (size_t lane = 0; lane < 32; ++lane) {
      const size_t major = lane / 4, minor = lane % 4 * 2;
      const uint32_t low = in.detail[transposed] ? rows[minor][major] : rows[major][minor];
      const uint32_t high = in.detail[transposed] ? rows[minor + 1][major] : rows[major][minor + 1];
      w.set(part(to, m), static_cast<int>(lane), low | high << 16);
    }
  }
  return Outcome::next;
}

Rows gather(Warp &w, const Operand &from, bool transpose) {
  Rows rows;
  for (size_t lane = 0; lane < 32; ++lane) {
    const auto pair = static_cast<uint32_t>(w.get(from, static_cast<int>(lane)));
    for (size_t i = 0; i < 2; ++i) {
      const auto value = static_cast<uint16_t>(pair >> 16 * i);
      if (transpose)
        rows[lane % 4 * 2 + i][lane / 4] = value;
      else
        rows[lane / 4][lane % 4 * 2 + i] = value;
    }
  }
  return rows;
}

Outcome stmatrix(Warp &w, const Instruction &in, Lanes lanes) {
  if (!whole(w, in, lanes)) return Outcome::wait;
  for (int m = 0; m < in.detail[matrices]; ++m) {
    const Rows rows = gather(w, part(in.operands[1], m), in.detail[transposed]);
    for (int r = 0; r < 8; ++r) {
      const int lane = m * 8 + r;
      unsigned char *to = w.block.shared_at(w, in, lane, w.address(in.operands[0], lane), 16, 16);
      const auto &row = rows[static_cast<size_t>(r)];
      if (w.block.races) w.block.races->access(w, in, lane, to, 16, Races::writes, Races::weak, row.data());
      std::memcpy(to, row.data(), 16);
      w.block.shared.unfenced[static_cast<size_t>(to - w.block.shared.bytes.data()) / 16] = 1;
    }
  }
  return Outcome::next;
}

Outcome movmatrix(Warp &w, const Instruction &in, Lanes lanes) {
  if (!whole(w, in, lanes)) return Outcome::wait;
  const Rows rows = gather(w, in.operands[1], true);
  for (size_t lane = 0; lane < 32; ++lane) {
    const auto &row = rows[lane / 4];
    w.set(in.operands[0], static_cast<int>(lane), row[lane % 4 * 2] | static_cast<uint32_t>(row[lane % 4 * 2 + 1]) << 16);
  }
  return Outcome::next;
}

// ---- mma.sync ----

enum Mma { m, k, type_a, type_b, type_c, type_d, saturates };
constexpr int n = 8;

// A and B: each register has 32 / bits elements that are neighbours in k (f64: one); lane l has row (of B: column) l / 4, and
// its place in k is l % 4. A's registers are first those of rows 0 to 7 and 8 to 15, then of the next k.
template <class F>
void fragment(Warp &w, const Operand &from, int type, int row_blocks, F put) {
  const int width = bits_of(type), each = width == 64 ? 1 : 32 / width;
  for (int r = 0; r < parts(from); ++r)
    for (int lane = 0; lane < 32; ++lane) {
      const uint64_t bits = w.get(part(from, r), lane);
      const int row = lane / 4 + r % row_blocks * 8, place = (r / row_blocks * 4 + lane % 4) * each;
      for (int i = 0; i < each; ++i) put(row, place + i, decode(type, bits >> i * width));
    }
}

// C and D: two neighbours of row l / 4, then two of row l / 4 + 8; two halves share a register.
template <class F>
void accumulators(const Operand &o, int type, F each) {
  const int per = type == f16 ? 2 : 1;
  for (int i = 0; i < parts(o) * per; ++i)
    for (int lane = 0; lane < 32; ++lane) each(part(o, i / per), i % per * 16, lane, lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
}

Outcome mma(Warp &w, const Instruction &in, Lanes lanes) {
  if (!whole(w, in, lanes)) return Outcome::wait;
  const int rows = in.detail[m], depth = in.detail[k], type = in.detail[type_d];
  double a[16 * 32], b[32 * n], c[16 * n];
  fragment(w, in.operands[1], in.detail[type_a], rows / 8, [&](int i, int j, double x) { a[i * depth + j] = x; });
  fragment(w, in.operands[2], in.detail[type_b], 1, [&](int i, int j, double x) { b[j * n + i] = x; });
  accumulators(in.operands[3], in.detail[type_c], [&](const Operand &o, int shift, int lane, int i, int j) {
    c[i * n + j] = decode(in.detail[type_c], w.get(o, lane) >> shift);
  });
  if (type == f64) {
    for (int i = 0; i < rows; ++i)
      for (int l = 0; l < depth; ++l)
        for (int j = 0; j < n; ++j) c[i * n + j] = std::fma(a[i * depth + l], b[l * n + j], c[i * n + j]);
  } else {
    // Steps of 16 bytes, as on sm_80.
    multiply(rows, n, depth, std::min(depth, 128 / bits_of(in.detail[type_a])), type, a, b, c);
  }
  accumulators(in.operands[0], type, [&](const Operand &o, int shift, int lane, int i, int j) {
    const uint64_t bits = encode(type, c[i * n + j], in.detail[saturates]);
    w.set(o, lane, shift ? w.get(o, lane) | bits << shift : bits);
  });
  return Outcome::next;
}

struct Shape {
  int m, k, bits;  // bits of an element
};
// With n = 8; those of PTX but for m8n8k4 of f16, and 4 bits and fewer.
constexpr Shape shapes[] = {{16, 8, 16}, {16, 16, 16}, {16, 4, 32}, {16, 8, 32}, {8, 16, 8},  {16, 16, 8},
                            {16, 32, 8}, {8, 4, 64},   {16, 4, 64}, {16, 8, 64}, {16, 16, 64}};

bool decode_mma(Instruction &in) {
  // mma.sync.aligned.shape.row.col{.satfinite}.d.a.b.c
  std::vector<std::string> words = in.words;
  words.erase(std::remove(words.begin(), words.end(), "satfinite"), words.end());
  int rows = 0, columns = 0, depth = 0;
  if (words.size() != 10 || std::sscanf(words[3].c_str(), "m%dn%dk%d", &rows, &columns, &depth) != 3 || columns != n)
    return false;
  if (words[4] != "row" || words[5] != "col") return false;
  const int d = element(words[6]), a = element(words[7]), b = element(words[8]), c = element(words[9]);
  if (a < 0 || b < 0 || bits_of(a) != bits_of(b) || a == f32 || a == s32) return false;
  const auto fits = [&](int sum) {
    switch (a) {
      case f16: return sum == f16 || sum == f32;
      case bf16:
      case tf32: return sum == f32;
      case f64: return sum == f64;
      default: return sum == s32;
    }
  };
  if (!fits(c) || !fits(d) || (a != b && fits(f32))) return false;
  const int bits = bits_of(a);
  if (std::none_of(std::begin(shapes), std::end(shapes),
                   [&](const Shape &s) { return s.m == rows && s.k == depth && s.bits == bits; }))
    return false;
  const int per = bits == 64 ? 1 : 32 / bits;
  const auto sums = [&](int type) { return rows * n / 32 / (type == f16 ? 2 : 1); };
  if (parts(in.operands[0]) != sums(d) || parts(in.operands[1]) != rows * depth / 32 / per ||
      parts(in.operands[2]) != n * depth / 32 / per || parts(in.operands[3]) != sums(c))
    return false;
  const int detail[] = {rows, depth, a, b, c, d, words.size() != in.words.size()};
  std::copy(std::begin(detail), std::end(detail), in.detail);
  in.execute = mma;
  return true;
}

}  // namespace

bool decode_warp_matrix(Instruction &in) {
  const std::string &name = in.words[0];
  if (name == "mma") return decode_mma(in);
  if (name == "movmatrix") {
    in.execute = movmatrix;
    return true;
  }
  if (name != "ldmatrix" && name != "stmatrix") return false;
  // ldmatrix.sync.aligned.m8n8.num{.trans}{.shared}.b16; stmatrix has shape and num in the same places.
  if (in.words.size() < 6 || in.words[3] != "m8n8" || in.words.back() != "b16") return false;
  const std::string &count = in.words[4];
  if (count != "x1" && count != "x2" && count != "x4") return false;
  in.detail[matrices] = count[1] - '0';
  in.detail[transposed] = std::find(in.words.begin(), in.words.end(), "trans") != in.words.end();
  if (parts(in.operands[name == "ldmatrix" ? 0 : 1]) != in.detail[matrices]) return false;
  in.execute = name == "ldmatrix" ? ldmatrix : stmatrix;
  return true;
}

}  // namespace ptx
