// Matrix products of a warp (mma.sync, ldmatrix) and of a Hopper warp group (wgmma), float16 in, float32 sums.
//
// The host halves compute each thread's elements as the PTX manual lays fragments, descriptors and swizzles out, so a wrong
// index in packing or in a kernel is a wrong result there; products of a warp group happen at their wait at the latest.
#ifndef VQK_CUDA_NEAREST_MATRIX_CUH
#define VQK_CUDA_NEAREST_MATRIX_CUH

#include "cuda/portable.cuh"

namespace vqk {

#if defined(__CUDACC__)

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + j points at row j of matrix i. Lane l gets the elements 2 (l % 4) and
// the next one of row l / 4 of each.
VQK_DEVICE void load_matrices(uint32_t (&to)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// m16n8k16, c += a b: c[2 h + b] is row l / 4 + 8 h, column 2 (l % 4) + b of lane l.
VQK_DEVICE void multiply_warp(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VQK_WGMMA(...) asm volatile(__VA_ARGS__)
#else  // other architectures never launch what calls these
#define VQK_WGMMA(...) static_cast<void>(0)
#endif

// Before the first product of a batch: earlier accesses to its accumulators are over.
VQK_DEVICE void group_begin() { VQK_WGMMA("wgmma.fence.sync.aligned;" :: : "memory"); }
VQK_DEVICE void group_commit() { VQK_WGMMA("wgmma.commit_group.sync.aligned;" :: : "memory"); }
// At most the `batches` youngest batches are under way afterwards.
template <int batches>
VQK_DEVICE void group_wait() {
  VQK_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(batches) : "memory");
}
// Accumulators are used no earlier than here, whatever the compiler can prove.
VQK_DEVICE void pin(float (&c)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) VQK_WGMMA("" : "+f"(c[i])::"memory");
}

// m64n128k16, c = a b + (accumulate ? c : 0), both operands K-major in shared memory: c[4 j + 2 h + b] is row
// 16 (warp of the group) + l / 4 + 8 h, column 8 j + 2 (l % 4) + b.
VQK_DEVICE void multiply_group(float (&c)[64], uint64_t a, uint64_t b, bool accumulate) {
#define VQK_C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define VQK_C16(i) VQK_C4(i), VQK_C4(i + 4), VQK_C4(i + 8), VQK_C4(i + 12)
  VQK_WGMMA(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;\n}" : VQK_C16(0),
      VQK_C16(16), VQK_C16(32), VQK_C16(48) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
#undef VQK_C16
#undef VQK_C4
}

#else

inline void load_matrices(uint32_t (&to)[4], const void *row) {
  check_aligned(row, 16, "load_matrices");
  const auto rows = host::exchange(~0u, "load_matrices", row);
  for (int i = 0; i < 4; ++i) std::memcpy(&to[i], static_cast<const char *>(rows[8 * i + lane() / 4]) + 4 * (lane() % 4), 4);
}

struct WarpOperands {
  uint32_t a[4], b[2];
};

inline void multiply_warp(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto all = host::exchange(~0u, "multiply_warp", WarpOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto half = [](uint32_t pair, int k) { return f16_to_float(static_cast<uint16_t>(pair >> 16 * (k % 2))); };
  float left[2][16], right[2][16];
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < 2; ++i) {
      const int source = lane() / 4 * 4 + k % 8 / 2;  // a: row l / 4 + 8 h, elements 2 (l % 4) + ..
      left[i][k] = half(all[source].a[i + 2 * (k / 8)], k);
      const int column = 2 * (lane() % 4) + i;  // b: column l / 4
      right[i][k] = half(all[column * 4 + k % 8 / 2].b[k / 8], k);
    }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) c[i] += left[i / 2][k] * right[i % 2][k];
}

inline void group_begin() {}
inline void group_commit() { host::commit(1); }
template <int batches>
void group_wait() {
  host::wait(1, batches);
  host::exchange(~0u, "group_wait", 0);  // .sync.aligned: what one lane does next comes after every lane's wait
}
inline void pin(float (&)[64]) {}

// 16 bytes of a K-major operand: its row and chunk of 8 elements, through the descriptor's start, stride and swizzle.
inline const uint16_t *group_operand(const unsigned char *shared, uint64_t descriptor, int row, int chunk) {
  const uint64_t kind = descriptor >> 62;  // 1, 2, 3: rows of 128, 64, 32 bytes
  if (kind == 0) host::error("multiply_group: a descriptor without a swizzle");
  uint64_t at = (descriptor & 0x3fff) * 16 + static_cast<uint64_t>(row / 8) * ((descriptor >> 32 & 0x3fff) * 16) +
                static_cast<uint64_t>(row % 8) * (256u >> kind) + static_cast<uint64_t>(chunk) * 16;
  at ^= (at >> 7 & ((8u >> (kind - 1)) - 1)) << 4;
  return reinterpret_cast<const uint16_t *>(shared + at);
}

inline void multiply_group(float (&c)[64], uint64_t a, uint64_t b, bool accumulate) {
  const unsigned char *shared = &shared_memory<unsigned char>();
  const int thread = static_cast<int>(threadIdx.x % 128);
  float *out = c;
  host::issue(1, [=] {
    const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
    float left[2][16];
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k) left[h][k] = f16_to_float(group_operand(shared, a, row + 8 * h, k / 8)[k % 8]);
    for (int i = 0; i < 32; ++i) {
      const int at = column + i / 2 * 8 + i % 2;
      float right[16];
      for (int k = 0; k < 16; k += 8) {
        const uint16_t *chunk = group_operand(shared, b, at, k / 8);
        for (int j = 0; j < 8; ++j) right[k + j] = f16_to_float(chunk[j]);
      }
      for (int h = 0; h < 2; ++h) {
        float &to = out[i / 2 * 4 + 2 * h + i % 2];
        float sum = accumulate ? to : 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[h][k] * right[k];
        to = sum;
      }
    }
  });
}

inline uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char *>(pointer) - &shared_memory<unsigned char>());
}

#endif

// A K-major operand whose rows of `pitch` bytes (128, 64 or 32) are swizzled in groups of 8 rows.
VQK_DEVICE uint64_t descriptor(uint32_t address, int pitch) {
  const uint64_t kind = pitch == 128 ? 1 : pitch == 64 ? 2 : 3;
  return kind << 62 | static_cast<uint64_t>(pitch * 8 / 16) << 32 | uint64_t{1} << 16 | static_cast<uint64_t>(address) / 16;
}

}  // namespace vqk

#endif
