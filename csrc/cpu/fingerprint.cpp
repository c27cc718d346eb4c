// A 128-bit fingerprint of a codebook's content: it says whether a packed codebook is still the right one.
// Not cryptographic; 8 lanes of multiply-and-add per 64 bytes, as xxHash's XXH3 does, with keys that depend on the position.
#include <new>

#include "common.h"

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

void hash_piece(const unsigned char *data, int64_t bytes, uint64_t piece, uint64_t *out) {
  uint64_t sum[8], key[8];
  for (int i = 0; i < 8; ++i) {
    sum[i] = mix(piece * 8 + static_cast<uint64_t>(i) + 1);
    key[i] = mix(sum[i] + kPrime);
  }
  int64_t at = 0;
  for (; at < bytes; at += 64) {
    uint64_t word[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    std::memcpy(word, data + at, static_cast<size_t>(bytes - at < 64 ? bytes - at : 64));
    for (int i = 0; i < 8; ++i) {
      const uint64_t keyed = word[i] ^ key[i];
      sum[i ^ 1] += word[i];
      sum[i] += (keyed & 0xffffffffu) * (keyed >> 32);
      key[i] += kPrime;
    }
    if ((at & 1023) == 960)
      for (int i = 0; i < 8; ++i) sum[i] = (sum[i] ^ (sum[i] >> 47) ^ key[i]) * 0x9e3779b1u;
  }
  uint64_t low = static_cast<uint64_t>(bytes) * kPrime, high = ~low;
  for (int i = 0; i < 8; ++i) {
    low = mix(low ^ sum[i]) + kPrime;
    high = mix(high + (sum[i] << 32 | sum[i] >> 32)) ^ kPrime;
  }
  out[0] = low;
  out[1] = high;
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
