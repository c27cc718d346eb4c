// The whole C ABI of libvqk_cpu and libvqk_cuda<major>: plain pointers, sizes and strides, no torch, no Python. Python allocates,
// C fills. vqkernels/_native.py and _cuda.py declare the same functions and structs for ctypes; tests/test_native.py compares
// them.
#ifndef VQK_CAPI_H
#define VQK_CAPI_H

#include <stdint.h>

#if defined(_WIN32)
#define VQK_API extern "C" __declspec(dllexport)
#else
#define VQK_API extern "C" __attribute__((visibility("default")))
#endif

// Raise on every change of a struct or a signature; the loader refuses a library of another number.
#define VQK_ABI_VERSION 5

enum vqk_status { VQK_OK = 0, VQK_INVALID = 1, VQK_NO_MEMORY = 2, VQK_UNSUPPORTED = 3, VQK_INTERNAL = 4 };
enum vqk_dtype { VQK_F32 = 0, VQK_F64 = 1, VQK_F16 = 2, VQK_BF16 = 3 };
enum vqk_metric { VQK_L2 = 0, VQK_COSINE = 1, VQK_DOT = 2 };
enum vqk_precision { VQK_EXACT = 0, VQK_FAST = 1 };
enum vqk_gradient { VQK_STRAIGHT_THROUGH = 0, VQK_ROTATION = 1, VQK_NONE = 2 };
// In order of preference within one vendor; vqk_cpu_best_isa() knows the exceptions.
enum vqk_isa { VQK_SCALAR = 0, VQK_AVX2 = 1, VQK_AVX512 = 2, VQK_AVX512BF16 = 3, VQK_AMX = 4, VQK_NEON = 5 };

enum vqk_screen { VQK_SCREEN_NONE = 0, VQK_SCREEN_SM80 = 1, VQK_SCREEN_SM90 = 2 };  // NONE: every pair in float64

// Rows to quantize, (H, B, S, D) with any strides (in elements): a channel-first map is read in place.
typedef struct vqk_rows {
  void *data;
  int64_t size[4];
  int64_t stride[4];
  int32_t dtype;
  int32_t reserved;
} vqk_rows;

// Codebooks, (H, K, D) with any strides (in elements).
typedef struct vqk_codes {
  void *data;
  int64_t size[3];
  int64_t stride[3];
  int32_t dtype;
  int32_t reserved;
} vqk_codes;

// How a search on CUDA runs; vqkernels/_cuda_nearest.py decides. Any plan gives the same bits.
typedef struct vqk_cuda_search_plan {
  int32_t screen;           // vqk_screen
  int32_t splits;           // of the codes, over blocks
  int32_t multiprocessors;  // of the device
  int32_t shared;           // bytes of shared memory that a block may have there, at least 99 KB
  int64_t chunk_rows;       // rows per head that are alive at a time
} vqk_cuda_search_plan;

// at::parallel_for's exported C form (torch_parallel_for): int32 (begin, end, grain, body, context), 0 on success.
typedef void (*vqk_parallel_body)(int64_t begin, int64_t end, void *context);
typedef int32_t (*vqk_parallel_for)(int64_t begin, int64_t end, int64_t grain, vqk_parallel_body body, void *context);

// In both libraries: version, errors (per thread, valid until its next call), compiler.
VQK_API int32_t vqk_abi_version(void);
VQK_API const char *vqk_last_error(void);
VQK_API const char *vqk_build_info(void);

// Runtime of libvqk_cpu: threads, instruction sets.
VQK_API void vqk_cpu_set_parallel_for(vqk_parallel_for parallel_for);
VQK_API void vqk_cpu_set_num_threads(int32_t num_threads);  // what parallel_for would use: sizes the work items
VQK_API int32_t vqk_cpu_has_isa(int32_t isa);               // built in, and this machine runs it
VQK_API int32_t vqk_cpu_best_isa(void);

// nearest: the fastest instruction set for these sizes; fingerprint the codebook (is the packed one valid?), pack it, search.
VQK_API int32_t vqk_cpu_nearest_isa(int64_t num_codes, int64_t dim);
VQK_API int32_t vqk_cpu_nearest_needs_packing(const vqk_rows *x, const vqk_codes *codebook);  // 0: packed may be null
VQK_API int32_t vqk_cpu_nearest_fingerprint(const vqk_codes *codebook, uint64_t *fingerprint /* [2] */);
VQK_API int64_t vqk_cpu_nearest_packed_bytes(const vqk_codes *codebook, int32_t metric, int32_t isa);
VQK_API int32_t vqk_cpu_nearest_pack(const vqk_codes *codebook, int32_t metric, int32_t isa, void *packed);
// packed comes from the same codebook, metric and isa, 64-byte aligned. indices, score: contiguous (H, B, S).
VQK_API int32_t vqk_cpu_nearest(const vqk_rows *x, const vqk_codes *codebook, int32_t metric, int32_t precision, int32_t isa,
                                const void *packed, int64_t *indices, float *score);

// residual_nearest: `levels` searches (l2, exact), each in what the ones before it left over. codebooks and packed have one entry
// per level; packed itself may be null where needs_packing says 0. indices, score: contiguous (levels, H, B, S); out: the sums of
// the chosen codes, float64 for float64 x, else float32, with any strides.
VQK_API int32_t vqk_cpu_residual_nearest_needs_packing(const vqk_rows *x, const vqk_codes *codebooks, int32_t levels);
VQK_API int32_t vqk_cpu_residual_nearest(const vqk_rows *x, const vqk_codes *codebooks, int32_t levels, int32_t isa,
                                         const void *const *packed, int64_t *indices, float *score, const vqk_rows *out);

// lookup: out[h, b, s, :] = codebook[h, indices[h, b, s], :], zeros where the index is -1. out may have any strides and dtype.
VQK_API int32_t vqk_cpu_lookup(const vqk_codes *codebook, const int64_t *indices, const vqk_rows *out);

// codebook_sum: sums (H, K, D) contiguous in float32 (float64 for float64 x), counts (H, K) float32. Index -1 is skipped.
VQK_API int32_t vqk_cpu_codebook_sum(const vqk_rows *x, const int64_t *indices, int64_t num_codes, void *sums, float *counts);

// ema_update, in place: cluster_size (H, K), embed_avg (H, K, D), codebook (H, K, D), all contiguous float32.
VQK_API int32_t vqk_cpu_ema_update(float *cluster_size, float *embed_avg, float *codebook, const float *counts, const float *sums,
                                   int64_t heads, int64_t num_codes, int64_t dim, double decay, double eps, int32_t normalize);

// quantize_grad: dz of the quantizer's output and of its commitment loss in one pass (see ops/quantize_grad).
VQK_API int32_t vqk_cpu_quantize_grad(const vqk_rows *grad, const vqk_rows *z, const vqk_codes *codebook, const int64_t *indices,
                                      double commitment, int32_t gradient, const vqk_rows *out);

// quantize_output: out as lookup's, the mean squared difference twice and its weight (see ops/quantize_output). distance:
// contiguous (H, B, S); null: z is read, which may be null otherwise. Losses are float64 for float64 out, else float32.
VQK_API int32_t vqk_cpu_quantize_output(const vqk_rows *z, const vqk_codes *codebook, const int64_t *indices,
                                        const float *distance, const vqk_rows *out, void *codebook_loss, void *commitment_loss,
                                        double *weight);

// soft_assign: entropy (H,) and usage (H, K) of the softmax over codes, weighted sums over rows (see ops/soft_assign). weight:
// (H, N) with N = B S; it and the results are contiguous float32, like the arithmetic.
VQK_API int32_t vqk_cpu_soft_assign(const vqk_rows *x, const vqk_codes *codes, const float *weight, int32_t squared,
                                    double temperature, int32_t isa, float *entropy, float *usage);

// soft_assign_grad: dx with any strides and dtype, dcodes (H, K, D) contiguous. grad_entropy (H,) and grad_usage (H, K) may be
// null, and so may grad_soft together with values (see ops/soft_assign_grad).
VQK_API int32_t vqk_cpu_soft_assign_grad(const vqk_rows *x, const vqk_codes *codes, const float *weight,
                                         const float *grad_entropy, const float *grad_usage, const vqk_rows *grad_soft,
                                         const vqk_codes *values, int32_t squared, double temperature, int32_t isa,
                                         const vqk_rows *dx, float *dcodes);

// libvqk_cuda<major>. Pointers are the device's, `device` is its ordinal and `stream` a cudaStream_t: work is queued, nothing
// waits for it, and nothing is allocated, so that calls can be captured in a CUDA graph. Indices outside of [-1, K) count
// as -1, for nobody could be told. Workspaces are 256-byte aligned and free again when the stream has passed the call.
VQK_API int32_t vqk_cuda_host_executed(void);            // 1: the tests' build, which runs kernels on the host
VQK_API int32_t vqk_cuda_device_status(int32_t device);  // VQK_OK, or why kernels cannot run there
VQK_API int32_t vqk_cuda_lookup(const vqk_codes *codebook, const int64_t *indices, const vqk_rows *out, int32_t device,
                                void *stream);
VQK_API int64_t vqk_cuda_codebook_sum_workspace(const vqk_rows *x, int64_t num_codes);  // bytes
VQK_API int32_t vqk_cuda_codebook_sum(const vqk_rows *x, const int64_t *indices, int64_t num_codes, void *sums, float *counts,
                                      void *workspace, int32_t device, void *stream);
VQK_API int64_t vqk_cuda_ema_update_workspace(int64_t heads, int64_t num_codes);  // bytes
VQK_API int32_t vqk_cuda_ema_update(float *cluster_size, float *embed_avg, float *codebook, const float *counts,
                                    const float *sums, int64_t heads, int64_t num_codes, int64_t dim, double decay, double eps,
                                    int32_t normalize, void *workspace, int32_t device, void *stream);
// commitment: one value on the device, float64 for float64 z, else float32.
VQK_API int32_t vqk_cuda_quantize_grad(const vqk_rows *grad, const vqk_rows *z, const vqk_codes *codebook, const int64_t *indices,
                                       const void *commitment, int32_t gradient, const vqk_rows *out, int32_t device,
                                       void *stream);
VQK_API int64_t vqk_cuda_quantize_output_workspace(const vqk_rows *out);  // bytes
VQK_API int32_t vqk_cuda_quantize_output(const vqk_rows *z, const vqk_codes *codebook, const int64_t *indices,
                                         const float *distance, const vqk_rows *out, void *codebook_loss, void *commitment_loss,
                                         double *weight, void *workspace, int32_t device, void *stream);

// nearest on CUDA: indices, score as above; workspace of so many bytes (-1: an error).
VQK_API int64_t vqk_cuda_nearest_workspace(const vqk_rows *x, const vqk_codes *codebook, int32_t metric,
                                           const vqk_cuda_search_plan *plan);
VQK_API int32_t vqk_cuda_nearest(const vqk_rows *x, const vqk_codes *codebook, int32_t metric, int32_t precision,
                                 const vqk_cuda_search_plan *plan, void *workspace, int64_t *indices, float *score,
                                 int32_t device, void *stream);
// Sums of 128 packed rows and one packed tile of codes, (128, 128), for the self-test. copied: what arrived in shared memory, or
// null; late: 1 if it did not (both VQK_SCREEN_SM90 only). bits, advance: other descriptors than the screen's; 0: its own.
VQK_API int32_t vqk_cuda_nearest_products(int32_t screen, int32_t width, int32_t panels, const void *rows, const void *codes,
                                          float *sums, void *copied, int32_t *late, uint64_t bits, int32_t advance,
                                          int32_t device, void *stream);

// residual_nearest on CUDA: `levels` codebooks. indices (Q, H, N), score (Q, H, N); values float32, any strides. Without a screen
// one cooperative launch does it all, for at most 64 levels and 512 dims, and as many rows as can be resident.
VQK_API int64_t vqk_cuda_residual_nearest_workspace(const vqk_rows *x, const vqk_codes *codebooks, int32_t levels,
                                                    const vqk_cuda_search_plan *plan);
VQK_API int32_t vqk_cuda_residual_nearest(const vqk_rows *x, const vqk_codes *codebooks, int32_t levels,
                                          const vqk_cuda_search_plan *plan, void *workspace, int64_t *indices,
                                          const vqk_rows *values, float *score, int32_t device, void *stream);

#endif
