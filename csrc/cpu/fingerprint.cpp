// A 128-bit fingerprint of a codebook's content: it says whether a packed codebook is still the right one.
// Not cryptographic; 16 lanes of multiply-and-add per 128 bytes in the manner of XXH3, with keys that depend on the position.
#include <new>

#include "cpu/elements.h"

namespace vqk {
namespace {

constexpr int64_t kPiece = 1 << 16;  // bytes hashed on their own, so that threads don't change the result
constexpr int kLanes = 16;           // independent sums of 64-bit words: enough to hide their latency
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
  uint64_t product[kLanes], plain[kLanes], key[kLanes], word[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    product[i] = mix(piece * kLanes + static_cast<uint64_t>(i) + 1);
    plain[i] = mix(product[i] ^ kPrime);
    key[i] = mix(product[i] + kPrime);
  }
  const auto absorb = [&](const unsigned char *from) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      uint64_t loaded;
      std::memcpy(&loaded, from + 8 * i, 8);
      const uint64_t keyed = loaded ^ key[i];
      product[i] += (keyed & 0xffffffffu) * (keyed >> 32);
      plain[i] = ((plain[i] << 7) | (plain[i] >> 57)) + loaded;
      key[i] += kPrime;
    }
  };
  int64_t at = 0;
  for (; at + kLanes * 8 <= bytes; at += kLanes * 8) absorb(data + at);
  if (at < bytes) {  // zeros stand for what is missing; the number of bytes is hashed below
    std::memset(word, 0, sizeof word);
    std::memcpy(word, data + at, static_cast<size_t>(bytes - at));
    absorb(reinterpret_cast<const unsigned char *>(word));
  }
  uint64_t low = static_cast<uint64_t>(bytes) * kPrime, high = ~low;
  for (int i = 0; i < kLanes; ++i) {
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
