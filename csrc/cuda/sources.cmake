# The CUDA kernels, for both builds of them.
set(VQK_CUDA_SOURCES runtime.cu lookup.cu codebook_sum.cu ema_update.cu quantize_grad.cu quantize_output.cu nearest.cu nearest_products.cu
                     residual_nearest.cu)
