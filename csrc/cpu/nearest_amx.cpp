// AMX: bf16 screen on 16 x 16 tiles. A holds 16 codes, B 16 rows, so a tile's rows are codes, its columns rows of x, and the
// maximum over codes is again a vertical one. Two tiles of codes x two of rows, 4 accumulators, 32 dims per product.
#include "cpu/nearest_bf16.h"

namespace vqk {
namespace {

struct __attribute__((packed)) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

// Eight tiles of 16 x 64 bytes for the life of the object; releasing them keeps context switches cheap and leaves other
// libraries the state that they expect.
struct Tiles {
  Tiles() {
    TileConfig config;
    std::memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.column_bytes[i] = 64;
      config.rows[i] = 16;
    }
    // gcc 12 thinks that the instruction reads 8 of the 64 bytes.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

constexpr int kTile = 256;  // elements of a 16 x 16 tile

// Accumulators start at the bias of their code in every column.
VQK_INLINE void spread_bias(const float *bias, float *out) {
  for (int c = 0; c < kCodes; ++c) _mm512_storeu_ps(out + c * 16, _mm512_set1_ps(bias[c]));
}

VQK_INLINE __m512 tile_max(const float *tile) {
  __m512 a = _mm512_load_ps(tile), b = _mm512_load_ps(tile + 16), c = _mm512_load_ps(tile + 32), d = _mm512_load_ps(tile + 48);
#pragma GCC unroll 3
  for (int i = 1; i < 4; ++i) {
    a = _mm512_max_ps(a, _mm512_load_ps(tile + i * 64));
    b = _mm512_max_ps(b, _mm512_load_ps(tile + i * 64 + 16));
    c = _mm512_max_ps(c, _mm512_load_ps(tile + i * 64 + 32));
    d = _mm512_max_ps(d, _mm512_load_ps(tile + i * 64 + 48));
  }
  return _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d));
}

struct Amx : Bf16Base {
  static constexpr bool splits = true;
  VQK_SIMD_POLICY_MEMBERS(Amx)

  VQK_INLINE int64_t used_steps(int64_t dim) { return dim <= kSplitDims ? 16 : (dim + 1) / 2; }
  // Few dims: two bf16 parts per value, [x1 x2 x1 1 1 1] (nearest.h, kSplitDims).
  static Quantised quantise(const float *x, const float *centre, float scale, int64_t dim, uint32_t *out) {
    if (dim > kSplitDims) return Bf16Base::quantise(x, centre, scale, dim, out);
    const __mmask16 mask = tail_mask(dim);
    const __m512 v =
        _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x), _mm512_maskz_loadu_ps(mask, centre)), set(scale));
    const __m256i first = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
    const __m512 rest = _mm512_sub_ps(v, widen_bf16(first));
    const __m256i second = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
    const __m512 lost = _mm512_sub_ps(rest, widen_bf16(second));
    uint16_t *parts = reinterpret_cast<uint16_t *>(out);
    _mm512_storeu_si512(out, _mm512_setzero_si512());
    _mm256_mask_storeu_epi16(parts, mask, first);
    _mm256_mask_storeu_epi16(parts + dim, mask, second);
    _mm256_mask_storeu_epi16(parts + 2 * dim, mask, first);
    for (int64_t i = 0; i < 3; ++i) parts[3 * dim + i] = 0x3f80;  // one
    return {_mm512_reduce_add_ps(_mm512_mul_ps(v, v)), _mm512_reduce_add_ps(_mm512_mul_ps(lost, lost)), 1};
  }

  // Writes the group maxima of two tiles of codes and two of rows.
  VQK_INLINE void reduce(Block *block, const float *tiles, int64_t code_block, int64_t row_tile) {
    const int64_t per_group = block->head->blocks_per_group;
    for (int v = 0; v < 2; ++v) {
      const __m512 first = tile_max(tiles + v * kTile), second = tile_max(tiles + (2 + v) * kTile);
      float *out = strip_at(block, lanes, row_tile + v * lanes, code_block / per_group);
      if (per_group == 1) {
        _mm512_storeu_ps(out, first);
        _mm512_storeu_ps(out + lanes, second);
      } else {
        const __m512 both = _mm512_max_ps(first, second);
        _mm512_storeu_ps(out, code_block % per_group == 0 ? both : _mm512_max_ps(both, _mm512_loadu_ps(out)));
      }
    }
  }

  static void exclude(PackedHead *head, int64_t code) {
    exclude_by_bias(head, code);
    if (head->dim > kSplitDims) return;
    const int64_t element = (code / kCodes * kCodes + code % kCodes) * head->steps;    // one tile per block: rows of 16 steps
    reinterpret_cast<uint16_t *>(head_codes(head) + element)[3 * head->dim] = 0xff80;  // -inf
  }

  static void screen(Block *block, int64_t begin, int64_t end) {
    const Tiles tiles;
    if (block->head->dim <= kSplitDims)
      screen_blocks<true>(block, begin, end);
    else
      screen_blocks<false>(block, begin, end);
  }

  template <bool BiasInside>
  static void screen_blocks(Block *block, int64_t begin, int64_t end) {
    const PackedHead *head = block->head;
    const int64_t steps = head->steps, pitch = steps * kCodes;
    alignas(64) float bias[2][kTile];
    alignas(64) float scores[2][4 * kTile];
    for (int64_t b = begin; b < end; b += 2) {
      if (!BiasInside) {
        spread_bias(head_bias(head) + b * kCodes, bias[0]);
        spread_bias(head_bias(head) + (b + 1) * kCodes, bias[1]);
      }
      const uint32_t *codes = head_codes(head) + b * pitch;
      int64_t previous = -1;
      int side = 0;
      for (int64_t tile = 0; tile < block->padded_rows; tile += 2 * lanes) {
        const uint32_t *rows = block->packed_rows + tile * steps;
        if (BiasInside) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          _tile_loadd(0, bias[0], 64);
          _tile_loadd(1, bias[0], 64);
          _tile_loadd(2, bias[1], 64);
          _tile_loadd(3, bias[1], 64);
        }
        for (int64_t s = 0; s < pitch; s += kTile) {
          _tile_loadd(4, codes + s, 64);
          _tile_loadd(6, rows + s, 64);
          _tile_loadd(7, rows + pitch + s, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, codes + pitch + s, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        // The previous tile's maxima run beside this tile's products.
        if (previous >= 0) reduce(block, scores[side ^ 1], b, previous);
        _tile_stored(0, scores[side], 64);
        _tile_stored(1, scores[side] + kTile, 64);
        _tile_stored(2, scores[side] + 2 * kTile, 64);
        _tile_stored(3, scores[side] + 3 * kTile, 64);
        previous = tile;
        side ^= 1;
      }
      if (previous >= 0) reduce(block, scores[side ^ 1], b, previous);
    }
  }

  // Up to four blocks of codes against one tile of rows at a time: four independent accumulators hide the latency.
  struct Queue {
    int count = 0;
    int64_t code_block[4];
    uint32_t rows[4];
    __m512 limit[4];
  };

  template <class Emit>
  VQK_INLINE void refine(Block *block, int64_t tile, Queue *queue, const Emit &emit) {
    const PackedHead *head = block->head;
    const int64_t pitch = head->steps * kCodes;
    const uint32_t *rows = block->packed_rows + tile * head->steps;
    const bool inside = head->dim <= kSplitDims;
    alignas(64) float scores[4 * kTile];
    const uint32_t *codes[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t b = queue->code_block[i < queue->count ? i : 0];
      codes[i] = head_codes(head) + b * pitch;
      if (inside)
        std::memset(scores + i * kTile, 0, kTile * sizeof(float));
      else
        spread_bias(head_bias(head) + b * kCodes, scores + i * kTile);
    }
    _tile_loadd(0, scores, 64);
    _tile_loadd(1, scores + kTile, 64);
    _tile_loadd(2, scores + 2 * kTile, 64);
    _tile_loadd(3, scores + 3 * kTile, 64);
    for (int64_t s = 0; s < pitch; s += kTile) {
      _tile_loadd(6, rows + s, 64);
      _tile_loadd(4, codes[0] + s, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, codes[1] + s, 64);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, codes[2] + s, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, codes[3] + s, 64);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + kTile, 64);
    _tile_stored(2, scores + 2 * kTile, 64);
    _tile_stored(3, scores + 3 * kTile, 64);
    for (int i = 0; i < queue->count; ++i) {
      for (int c = 0; c < kCodes; ++c) {
        uint32_t found = at_least(load(scores + i * kTile + c * 16), queue->limit[i]) & queue->rows[i];
        for (; found != 0; found &= found - 1) emit(tile + __builtin_ctz(found), queue->code_block[i] * kCodes + c);
      }
    }
    queue->count = 0;
  }

  template <class Emit>
  VQK_INLINE void candidates(Block *block, int64_t tile, const float *threshold, const Emit &emit) {
    Queue queue;
    const int64_t per_group = block->head->blocks_per_group;
    for_each_candidate_group<Amx>(block, tile, threshold, [&](int64_t group, uint32_t rows, __m512 limit) {
      for (int64_t b = group * per_group; b < (group + 1) * per_group; ++b) {
        queue.code_block[queue.count] = b;
        queue.rows[queue.count] = rows;
        queue.limit[queue.count] = limit;
        if (++queue.count == 4) refine(block, tile, &queue, emit);
      }
    });
    if (queue.count > 0) refine(block, tile, &queue, emit);
  }

  static void finish(Block *block) {
    const Tiles tiles;
    finish_block<Amx>(block);
  }
};

}  // namespace

const Kernels kernels_amx = {
    2,           16,          Amx::lanes, 2 * Amx::lanes, 256, pack_codes<Amx, Tiled>, Amx::exclude, prepare_rows<Amx>,
    Amx::screen, Amx::finish, nullptr,    nullptr};

}  // namespace vqk
