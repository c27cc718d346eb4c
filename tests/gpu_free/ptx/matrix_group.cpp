// wgmma: products of matrices in shared memory (A also in registers), by the four warps of a group, asynchronously. Each warp
// computes its own 16 of the 64 rows at some moment between the instruction and the wait that covers it.
#include <algorithm>
#include <cstdio>

#include "matrix.h"
#include "races.h"

namespace ptx {

struct MatrixState {
  struct Product {
    uint64_t group;  // how many groups the warp had committed before
    std::function<void()> work;
  };
  struct OfWarp {
    bool fenced = false;  // wgmma.fence, and no wait since
    uint64_t committed = 0, done = 0, issued = 0;
    std::deque<Product> products;  // number `done` to `issued`

    void run_until(uint64_t number) {
      while (done < number) {
        const auto work = std::move(products.front().work);
        products.pop_front();
        ++done;
        work();
      }
    }
  };
  // What the first warp of a group to come issued: the others must issue the same.
  struct Issued {
    const Instruction *instruction;
    uint64_t a, b;
    int warps = 0;
  };
  struct OfGroup {
    std::deque<Issued> issued;
    uint64_t first = 0;  // number of issued[0]
  };
  std::vector<OfWarp> warps;
  std::vector<OfGroup> groups;
};

namespace {

enum Detail { columns, depth, type_a, type_b, type_d, transposes_a, transposes_b, flags };
enum Flag { a_in_registers = 1, negates_a = 2, negates_b = 4, saturates = 8 };

MatrixState &state_of(Block &block) {
  if (!block.matrix) {
    block.matrix = std::make_shared<MatrixState>();
    block.matrix->warps.resize(block.warps.size());
    block.matrix->groups.resize(block.warps.size() / 4);
  }
  return *block.matrix;
}

// The four warps of a group run for themselves, but there must be four, and each whole. False: lanes have not come yet.
bool whole(Warp &w, const Instruction &in, Lanes lanes) {
  if (static_cast<size_t>(w.index / 4) >= w.block.warps.size() / 4) w.fail(in, -1, "its warp group has fewer than four warps");
  if (w.live != ~Lanes{0}) w.fail(in, -1, "not all 32 lanes of the warp are there");
  return lanes == w.live;
}

// ---- matrices in shared memory ----

// A matrix descriptor: bits 0-13 start address, 16-29 leading and 32-45 stride byte offset, all in units of 16 bytes, 49-51 base
// offset, 62-63 swizzle. "Granules" are 16 bytes, neighbours along the matrix' major dimension.
struct Matrix {
  uint64_t start, leading, stride;
  uint64_t width;  // granules of a row of the swizzle's pattern: 1 (none), 2, 4 or 8
  bool k_major;

  // Of the granule at `major` granules along the major dimension, and `minor` along the other.
  uint64_t address(uint64_t major, uint64_t minor) const {
    uint64_t at = start;
    if (k_major)  // 8 rows of `width` granules, one such block after the other along M or N
      at += minor / 8 * stride + minor % 8 * width * 16 + major * (width == 1 ? leading : 16);
    else if (width == 1)
      at += major * stride + minor / 8 * leading + minor % 8 * 16;
    else  // 8 steps of k, `width` granules of M or N each
      at += major / width * leading + major % width * 16 + minor / 8 * stride + minor % 8 * width * 16;
    return at ^ ((at >> 7 & (width - 1)) << 4);  // the swizzle is one of addresses, not of places in the matrix
  }
};

Matrix matrix(Warp &w, const Instruction &in, uint64_t bits, bool k_major, const char *name) {
  const auto field = [&](int at) { return (bits >> at & 0x3fff) << 4; };
  const uint64_t width[] = {1, 8, 4, 2};
  const Matrix m = {field(0), field(16), field(32), width[bits >> 62], k_major};
  const std::string which = std::string("the descriptor of ") + name;
  if (bits & 0x3ff1'c000'c000'c000) w.fail(in, -1, which + " has reserved bits set");
  // The pattern repeats every 8 rows. With a base offset of 0 it starts where the address is a multiple of its size, and a
  // matrix in its first row.
  if (bits >> 49 & 7) w.fail(in, -1, which + " has a base offset: not taken");
  if (m.width > 1 && m.start % (m.width * 128) >= m.width * 16)
    w.fail(in, -1,
           which + " starts at shared offset " + std::to_string(m.start) +
               ", where no row of granules of its swizzle's pattern is the first");
  return m;
}

// Calls f(major, minor, bytes) for the granules of `rows` rows (columns of B) from `first` on; 32 bytes of k.
template <class F>
void granules(Warp &w, const Instruction &in, const Matrix &m, const char *name, int type, int first, int rows, F f) {
  const int each = 128 / bits_of(type);  // elements of a granule
  const int majors = m.k_major ? 2 : rows / each, minors = m.k_major ? rows : 2 * each;
  for (int minor = 0; minor < minors; ++minor)
    for (int major = 0; major < majors; ++major) {
      const int at_major = major + (m.k_major ? 0 : first / each), at_minor = minor + (m.k_major ? first : 0);
      const uint64_t at = m.address(static_cast<uint64_t>(at_major), static_cast<uint64_t>(at_minor));
      const Shared &shared = w.block.shared;
      if (at + 16 > shared.bytes.size())
        w.fail(in, -1, std::string("matrix ") + name + " reaches shared offset " + std::to_string(at) + ", beyond the block's");
      if (shared.unfenced[at / 16])
        w.fail(in, -1,
               std::string("matrix ") + name + " reads shared offset " + std::to_string(at) +
                   ", written with no fence.proxy.async since");
      f(major * each, minor, shared.bytes.data() + at);
    }
}

// Elements [k][row] of `rows` rows (columns of B) from `first` on, each row `stride` elements apart in k.
void load(Warp &w, const Instruction &in, const Matrix &m, const char *name, int type, int first, int rows, double *out,
          int k_stride, int row_stride) {
  granules(w, in, m, name, type, first, rows, [&](int major, int minor, const unsigned char *bytes) {
    decode_granule(type, bytes, out + major * (m.k_major ? k_stride : row_stride) + minor * (m.k_major ? row_stride : k_stride),
                   m.k_major ? k_stride : row_stride);
  });
}

// ---- the instructions ----

// Accumulators of a warp: in each register pair two neighbours of row lane / 4, then of row lane / 4 + 8, then the next eight
// columns; two halves share a register.
template <class F>
void accumulators(const Operand &o, int type, int columns_in_all, F each) {
  const int per = type == f16 ? 2 : 1;
  for (int i = 0; i < columns_in_all / 2; ++i)
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      each(o.items[static_cast<size_t>(i / per)], i % per * 16, lane, row * columns_in_all + column);
    }
}

void product(Warp &w, const Instruction &in, const Matrix &a_shared, const Matrix &b_shared, bool accumulates) {
  const int n = in.detail[columns], k = in.detail[depth], type = in.detail[type_d];
  double a[16 * 32], c[16 * 256];
  std::vector<double> b(static_cast<size_t>(k) * static_cast<size_t>(n));
  if (in.detail[flags] & a_in_registers) {
    const int bits = bits_of(in.detail[type_a]), each = 32 / bits;
    for (int r = 0; r < 4; ++r)
      for (int lane = 0; lane < 32; ++lane) {
        const uint64_t word = w.get(in.operands[1].items[static_cast<size_t>(r)], lane);
        for (int i = 0; i < each; ++i)
          a[(lane / 4 + r % 2 * 8) * k + (r / 2 * 4 + lane % 4) * each + i] = decode(in.detail[type_a], word >> i * bits);
      }
  } else {
    load(w, in, a_shared, "A", in.detail[type_a], w.index % 4 * 16, 16, a, 1, k);
  }
  load(w, in, b_shared, "B", in.detail[type_b], 0, n, b.data(), n, 1);
  const bool negative = !(in.detail[flags] & negates_a) != !(in.detail[flags] & negates_b);
  if (negative)
    for (double &x : b) x = -x;
  std::fill_n(c, 16 * n, 0.0);
  if (accumulates)
    accumulators(in.operands[0], type, n,
                 [&](const Operand &o, int shift, int lane, int at) { c[at] = decode(type, w.get(o, lane) >> shift); });
  multiply(16, n, k, k, type, a, b.data(), c);
  accumulators(in.operands[0], type, n, [&](const Operand &o, int shift, int lane, int at) {
    const uint64_t bits = encode(type, c[at], in.detail[flags] & saturates);
    w.set(o, lane, shift ? w.get(o, lane) | bits << shift : bits);
  });
}

// What all lanes must have alike.
uint64_t uniform(Warp &w, const Instruction &in, const Operand &o) {
  const uint64_t value = w.get(o, 0);
  for (int lane = 1; lane < 32; ++lane)
    if (w.get(o, lane) != value) w.fail(in, lane, "\"" + o.text + "\" is not the same in all lanes");
  return value;
}

Outcome mma_async(Warp &w, const Instruction &in, Lanes lanes) {
  if (!whole(w, in, lanes)) return Outcome::wait;
  MatrixState &state = state_of(w.block);
  auto &mine = state.warps[static_cast<size_t>(w.index)];
  if (!mine.fenced) w.fail(in, -1, "no wgmma.fence before it (since the start, or since wgmma.wait_group)");
  const bool from_registers = in.detail[flags] & a_in_registers;
  const uint64_t a_bits = from_registers ? 0 : uniform(w, in, in.operands[1]), b_bits = uniform(w, in, in.operands[2]);
  const bool accumulates = (uniform(w, in, in.operands[3]) != 0) != in.operands[3].negated;

  auto &group = state.groups[static_cast<size_t>(w.index / 4)];
  if (mine.issued - group.first == group.issued.size()) group.issued.push_back({&in, a_bits, b_bits});
  auto &issued = group.issued[mine.issued - group.first];
  if (issued.instruction != &in || issued.a != a_bits || issued.b != b_bits)
    w.fail(in, -1, "another warp of its group executes another wgmma, or with other descriptors");
  if (++issued.warps == 4) {
    group.issued.pop_front();
    ++group.first;
  }

  const Matrix a = from_registers ? Matrix{} : matrix(w, in, a_bits, !in.detail[transposes_a], "A");
  const Matrix b = matrix(w, in, b_bits, !in.detail[transposes_b], "B");
  Races *const races = w.block.races.get();
  if (races || w.block.grid.deferred.random) {  // if it is done at once it checks that itself
    const auto check = [&](int, int, const unsigned char *bytes) {
      if (races) races->product(w, in, static_cast<size_t>(bytes - w.block.shared.bytes.data()), 16);
    };
    if (!from_registers) granules(w, in, a, "A", in.detail[type_a], w.index % 4 * 16, 16, check);
    granules(w, in, b, "B", in.detail[type_b], 0, in.detail[columns], check);
  }
  Warp *warp = &w;
  const Instruction *instruction = &in;
  mine.products.push_back({mine.committed, [=] { product(*warp, *instruction, a, b, accumulates); }});
  const uint64_t number = ++mine.issued;
  const std::weak_ptr<MatrixState> weak = w.block.matrix;
  w.block.grid.deferred.add(reinterpret_cast<uintptr_t>(&mine), [weak, number, index = static_cast<size_t>(w.index)] {
    if (const auto alive = weak.lock()) alive->warps[index].run_until(number);
  });
  return Outcome::next;
}

Outcome fence(Warp &w, const Instruction &in, Lanes lanes) {
  if (!whole(w, in, lanes)) return Outcome::wait;
  state_of(w.block).warps[static_cast<size_t>(w.index)].fenced = true;
  return Outcome::next;
}

Outcome commit_group(Warp &w, const Instruction &in, Lanes lanes) {
  if (!whole(w, in, lanes)) return Outcome::wait;
  ++state_of(w.block).warps[static_cast<size_t>(w.index)].committed;
  if (w.block.races) w.block.races->commit(w, lanes, Races::products);
  return Outcome::next;
}

Outcome wait_group(Warp &w, const Instruction &in, Lanes lanes) {
  if (!whole(w, in, lanes)) return Outcome::wait;
  auto &mine = state_of(w.block).warps[static_cast<size_t>(w.index)];
  const uint64_t but = w.get(in.operands[0], 0);
  uint64_t due = mine.done;
  for (const auto &product : mine.products) due += product.group + but < mine.committed;
  mine.run_until(due);
  if (w.block.races) w.block.races->wait(w, lanes, Races::products, static_cast<int64_t>(but));
  if (mine.products.empty()) w.block.grid.deferred.finish(reinterpret_cast<uintptr_t>(&mine));  // nothing is left of it
  mine.fenced = false;
  return Outcome::next;
}

// wgmma.mma_async.sync.aligned.shape{.satfinite}.d.a.b{.satfinite} d, a, b, scale-d{, scale-a, scale-b{, trans-a}{, trans-b}}
bool decode_mma(Instruction &in) {
  std::vector<std::string> words = in.words;
  words.erase(std::remove(words.begin(), words.end(), "satfinite"), words.end());
  int m = 0, n = 0, k = 0;
  if (words.size() != 8 || std::sscanf(words[4].c_str(), "m%dn%dk%d", &m, &n, &k) != 3) return false;
  const int d = element(words[5]), a = element(words[6]), b = element(words[7]);
  if (m != 64 || n < 8 || n > 256 || n % 8 || a < 0 || b < 0 || a == f32 || a == s32 || a == f64) return false;
  if (k != 256 / bits_of(a) || bits_of(a) != bits_of(b)) return false;
  const bool integers = a == s8 || a == u8;
  if (integers ? d != s32 || (b != s8 && b != u8) : a != b || (d != f32 && (d != f16 || a != f16))) return false;
  const size_t count = in.operands.size();
  const bool from_registers = in.operands[1].kind == Operand::vector, can_transpose = bits_of(a) == 16;
  const size_t wanted = integers ? 4 : !can_transpose ? 6 : from_registers ? 7 : 8;
  if (count != wanted || in.operands[0].items.size() != static_cast<size_t>(n / (d == f16 ? 4 : 2))) return false;
  if (from_registers && in.operands[1].items.size() != 4) return false;
  int set = (from_registers ? a_in_registers : 0) | (words.size() != in.words.size() ? saturates : 0);
  if (!integers) {
    if (static_cast<int32_t>(in.operands[4].bits) == -1) set |= negates_a;
    if (static_cast<int32_t>(in.operands[5].bits) == -1) set |= negates_b;
  }
  const bool trans_a = can_transpose && !from_registers && in.operands[6].bits,
             trans_b = can_transpose && in.operands.back().bits;
  const int detail[] = {n, k, a, b, d, trans_a, trans_b, set};
  std::copy(std::begin(detail), std::end(detail), in.detail);
  in.execute = mma_async;
  return true;
}

}  // namespace

bool decode_group_matrix(Instruction &in) {
  if (in.words[0] != "wgmma" || in.words.size() < 2) return false;
  const std::string &what = in.words[1];
  if (what == "mma_async") return decode_mma(in);
  if (what == "fence")
    in.execute = fence;
  else if (what == "commit_group")
    in.execute = commit_group;
  else if (what == "wait_group")
    in.execute = wait_group;
  else
    return false;
  return true;
}

}  // namespace ptx
