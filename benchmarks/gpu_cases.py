"""The problems measured on a GPU: the sizes at which the models are trained and used there.

Used by ``gpu_stages``; like ``cases``, without importing torch.
"""

from __future__ import annotations

from benchmarks.cases import Case

__all__ = ["BY_NAME", "FEW", "FEW_ROWS", "MEMORY", "OPS", "RESIDUAL", "SEARCH", "SOFT", "TRAIN", "UPDATE"]

CASES = (
    Case("vqgan", "VQGAN", (65536,), 16384, 256, source="vqgan_imagenet_f16_16384, 256 images"),
    Case("vqgan-init", "VQGAN, first step", (65536,), 16384, 256, codebook="uniform", source="the same, U(-1/K, 1/K)"),
    Case("vqgan-bf16", "VQGAN, bfloat16", (65536,), 16384, 256, source="the same under AMP", dtype="bfloat16"),
    Case("llamagen", "LlamaGen", (65536,), 16384, 8, "cosine", source="LlamaGen VQ-16, 256 images"),
    Case("var", "VAR", (65536,), 4096, 32, source="VAR vae_ch160v4096z32, 96 images"),
    Case("encodec", "EnCodec, 1 level", (640, 75), 1024, 128, channel_first=True, source="encodec_24khz, 640 x 1 s"),
    Case("mimi", "Mimi, 1 level", (20000,), 2048, 256, source="kyutai/mimi, 1600 s"),
    Case("ibq", "IBQ", (65536,), 262144, 256, source="SEED-Voken IBQ 262144, 256 images"),
    Case("ibq-1024", "IBQ, 4 images", (1024,), 262144, 256, source="SEED-Voken IBQ 262144, 4 images"),
    Case("streaming", "Mimi streaming", (64,), 2048, 256, source="kyutai/mimi, one frame of 64 streams"),
    Case("cifar", "VQ-VAE CIFAR", (32, 8, 8), 512, 64, channel_first=True, source="sonnet vqvae_example.ipynb"),
)
BY_NAME = {case.name: case for case in CASES}
# The most telling first: a run that is cut short has measured those.
SEARCH = ("vqgan", "llamagen", "ibq-1024", "var", "encodec", "mimi", "vqgan-bf16", "vqgan-init", "ibq")
UPDATE = ("vqgan", "llamagen")
# Every other op alone, for the table that "auto" goes by.
OPS = ("vqgan", "llamagen", "encodec", "cifar", "streaming", "ibq")
# A softmax over all codes. The reference has four rows at a time of IBQ's scores: 65536 of them would take minutes.
SOFT = ("vqgan", "var", "ibq-1024", "llamagen", "cifar")
TRAIN = ("vqgan", "llamagen", "encodec", "cifar")
MEMORY = ("vqgan", "llamagen")
# Streaming: so few rows that launches are all there is.
FEW = Case("few", "Mimi streaming", (1,), 2048, 256, source="kyutai/mimi, one frame per stream")
FEW_ROWS = (1, 4, 16, 64)
# All levels of a residual quantizer in one call: the case of one level, and how many there are.
RESIDUAL = (
    (Case("encodec-8", "EnCodec, 8 levels", (48000,), 1024, 128, source="encodec_24khz at 6 kbps, 640 x 1 s"), 8),
    (Case("mimi-1", "Mimi, 1 frame, 32 levels", (1,), 2048, 256, source="kyutai/mimi, a frame of one stream"), 32),
    (
        Case("mimi-16", "Mimi, 16 frames, 32 levels", (16,), 2048, 256, source="kyutai/mimi, one frame of 16 streams"),
        32,
    ),
)
