// A 128-bit fingerprint of a codebook's content: it says whether a packed codebook is still the right one.
// Not cryptographic; 8 lanes of multiply-and-add per 64 bytes in the manner of XXH3, with keys that depend on the position.
#include <new>

#include "cpu/elements.h"

namespace vqk {
namespace {

constexpr int64_t kPiece = 1 << 16;  // bytes hashed on their own, so that threads don't change the result
constexpr uint64_t kPrime = 0x9e3779b97f4a7c15ull;

VQK_INLINE uint64_t mix(uint64_t v) {
  v ^= v >> 33;
  v *= 0xff51afd7ed558ccdull;
  v ^= v >> 33;
  v *= 0xc4ceb9fe1a85ec53ull;
  return v ^ (v >> 33);
}

// Two sums per lane: products of the halves of the keyed word (they depend on the position) and the words themselves.
VQK_CLONES void hash_piece(const unsigned char *data, int64_t bytes, uint64_t piece, uint64_t *out) {
  uint64_t product[8], plain[8], key[8], word[8];
  for (int i = 0; i < 8; ++i) {
    product[i] = mix(piece * 8 + static_cast<uint64_t>(i) + 1);
    plain[i] = mix(product[i] ^ kPrime);
    key[i] = mix(product[i] + kPrime);
  }
  for (int64_t at = 0; at < bytes; at += 64) {
    if (bytes - at >= 64) {
      std::memcpy(word, data + at, 64);
    } else {
      std::memset(word, 0, 64);
      std::memcpy(word, data + at, static_cast<size_t>(bytes - at));
    }
#pragma omp simd
    for (int i = 0; i < 8; ++i) {
      const uint64_t keyed = word[i] ^ key[i];
      product[i] += (keyed & 0xffffffffu) * (keyed >> 32);
      plain[i] = ((plain[i] << 7) | (plain[i] >> 57)) + word[i];
      key[i] += kPrime;
    }
  }
  uint64_t low = static_cast<uint64_t>(bytes) * kPrime, high = ~low;
  for (int i = 0; i < 8; ++i) {
    low = mix(low ^ product[i]) + plain[i];
    high = mix(high + plain[i]) ^ product[i];
  }
  out[0] = mix(low);
  out[1] = mix(high);
}

}  // namespace
}  // namespace vqk

int32_t vqk_cpu_nearest_fingerprint(const vqk_codes *codebook, uint64_t *fingerprint) {
  const int64_t elements = codebook->size[0] * codebook->size[1] * codebook->size[2];
  const int64_t bytes = elements * static_cast<int64_t>(vqk::dtype_size(codebook->dtype));
  const bool contiguous = (codebook->stride[2] == 1 || codebook->size[2] <= 1) &&
                          (codebook->stride[1] == codebook->size[2] || codebook->size[1] <= 1) &&
                          (codebook->stride[0] == codebook->size[1] * codebook->size[2] || codebook->size[0] <= 1);
  if (!contiguous) return vqk::fail(VQK_INVALID, "the codebook must be contiguous");
  const unsigned char *data = static_cast<const unsigned char *>(codebook->data);
  const int64_t pieces = (bytes + vqk::kPiece - 1) / vqk::kPiece;
  uint64_t *part = new (std::nothrow) uint64_t[static_cast<size_t>(2 * pieces + 2)];
  if (part == nullptr) return vqk::fail(VQK_NO_MEMORY, "no memory for the fingerprint of %lld bytes", (long long)bytes);
  vqk::parallel_for(0, pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t start = p * vqk::kPiece, left = bytes - start;
      vqk::hash_piece(data + start, left < vqk::kPiece ? left : vqk::kPiece, static_cast<uint64_t>(p), part + 2 * p);
    }
  });
  uint64_t low = static_cast<uint64_t>(bytes), high = static_cast<uint64_t>(codebook->dtype) + vqk::kPrime;
  for (int64_t p = 0; p < pieces; ++p) {
    low = vqk::mix(low ^ part[2 * p]) + vqk::kPrime;
    high = vqk::mix(high + part[2 * p + 1]) ^ (low >> 7);
  }
  delete[] part;
  fingerprint[0] = low;
  fingerprint[1] = high;
  return VQK_OK;
}
