"""Named problems taken from real models: how many rows, codes and dims, which metric, which memory layout.

Used by ``run``, ``memory`` and the pytest-benchmark files. Importing this module does not import torch, so that the
command line can set the number of threads first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BY_NAME", "CASES", "MEMORY", "SEARCH", "TRAIN", "Case", "shrink"]


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        name: what ``--case`` takes.
        title: what tables and charts show.
        shape: batch and space, channels left out: ``(12, 16, 16)`` is 12 maps of 16 x 16, ``(64, 75)`` 64 clips of 75
            frames, ``(16384,)`` plain rows.
        codes: K.
        dim: D.
        metric: ``"l2"`` or ``"cosine"`` (rows and codes are then of unit length, as the model makes them).
        channel_first: whether the model hands the quantizer (B, D, *space), as convolutions do.
        codebook: ``"data"`` draws codes like rows (what k-means init gives), ``"uniform"`` is U(-1/K, 1/K), the classic
            VQ-VAE init.
        source: the model and its configuration.
        dtype: of latents and codes.
    """

    name: str
    title: str
    shape: tuple[int, ...]
    codes: int
    dim: int
    metric: str = "l2"
    channel_first: bool = False
    codebook: str = "data"
    source: str = ""
    dtype: str = "float32"

    @property
    def rows(self) -> int:
        """N."""
        return math.prod(self.shape)

    @property
    def size(self) -> str:
        """N x K x D, for tables."""
        return f"{self.rows} x {self.codes} x {self.dim}"

    @property
    def flops(self) -> int:
        """Operations of the inner products alone, 2NKD: what every speed is counted in."""
        return 2 * self.rows * self.codes * self.dim

    @property
    def floor_bytes(self) -> int:
        """What must cross the memory bus once: rows and codes in float32, indices (int64) and scores (float32) out."""
        return 4 * self.dim * (self.rows + self.codes) + 12 * self.rows

    def make(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The latents as the model's encoder leaves them, and the codebook.

        Returns:
            z: ``dtype``, contiguous, (B, D, *space) if ``channel_first``, else (N, D).
            codebook: ``dtype`` (K, D).
        """
        import torch
        from torch.nn import functional as F

        generator = torch.Generator().manual_seed(seed)
        channel = 1 if self.channel_first else len(self.shape)
        z = torch.randn(*self.shape[:channel], self.dim, *self.shape[channel:], generator=generator)
        if self.codebook == "uniform":
            codebook = (torch.rand(self.codes, self.dim, generator=generator) * 2 - 1) / self.codes
        else:
            codebook = torch.randn(self.codes, self.dim, generator=generator)
        if self.metric == "cosine":
            z, codebook = F.normalize(z, dim=channel), F.normalize(codebook, dim=1)
        dtype = getattr(torch, self.dtype)
        return z.to(dtype), codebook.to(dtype)

    def rows_of(self, z: Tensor) -> Tensor:
        """``z`` with the channels last, a view: (*shape, D)."""
        return z.movedim(1, -1) if self.channel_first else z


CASES = (
    # van den Oord et al. 2017 as in sonnet's vqvae_example: batch 32, CIFAR-10 at 8 x 8 latents, K = 512, D = 64.
    Case("vqvae-cifar", "VQ-VAE CIFAR", (32, 8, 8), 512, 64, channel_first=True, source="sonnet vqvae_example.ipynb"),
    # taming-transformers configs/imagenet_vqgan.yaml (vqgan_imagenet_f16_1024): f = 16, batch 12, n_embed 1024.
    Case("vqgan-1024", "VQGAN 1024", (12, 16, 16), 1024, 256, channel_first=True, source="vqgan_imagenet_f16_1024"),
    # The same with n_embed 16384 (vqgan_imagenet_f16_16384).
    Case("vqgan-16384", "VQGAN 16384", (12, 16, 16), 16384, 256, channel_first=True, source="vqgan_imagenet_f16_16384"),
    # Its first training step: nn.Embedding.weight.uniform_(-1/K, 1/K), where fp32 formulas lose the answer.
    Case(
        "vqgan-init",
        "VQGAN 16384, first step",
        (12, 16, 16),
        16384,
        256,
        channel_first=True,
        codebook="uniform",
        source="vqgan_imagenet_f16_16384 at initialisation",
    ),
    # Tokenising a data set: 64 images of 256 x 256 at once.
    Case("vqgan-big", "VQGAN, 64 images", (16384,), 16384, 256, source="vqgan_imagenet_f16_16384, batch 64, rows"),
    # LlamaGen tokenizer/tokenizer_image/vq_model.py VQ-16: 16 x 16 latents, codebook 16384 x 8, l2-normalised.
    Case("llamagen", "LlamaGen VQ-16", (16, 16, 16), 16384, 8, "cosine", True, source="LlamaGen VQ-16, batch 16"),
    # EnCodec 24 kHz: 75 frames a second, 128 dims, 1024 codes a level; the paper trains on 64 clips of 1 s. One level.
    Case("encodec", "EnCodec, 1 level", (64, 75), 1024, 128, channel_first=True, source="encodec_24khz, 64 x 1 s"),
    # VAR vqvae.py: 16 images x (1 + 4 + 9 + ... + 256 = 680) tokens of all ten scales, K = 4096, D = 32.
    Case("var", "VAR, 10 scales", (10880,), 4096, 32, source="VAR vae_ch160v4096z32, 16 images"),
    # Descript Audio Codec 24 kHz: hop 320, codebook_dim 8, 1024 codes a level, l2-normalised; 32 clips of 1 s.
    Case("dac", "DAC, 1 level", (32, 75), 1024, 8, "cosine", True, source="descript-audio-codec 24khz, 32 x 1 s"),
    # latent-diffusion models/first_stage_models/vq-f4: 64 x 64 latents, n_embed 8192, embed_dim 3; 8 images.
    Case("ldm-f4", "LDM VQ-f4", (8, 64, 64), 8192, 3, channel_first=True, source="latent-diffusion vq-f4, batch 8"),
    # Small D without a model's layout: rows in, l2.
    Case("small-d", "Small D", (16384,), 8192, 8, source="rows of D = 8, l2"),
    # Mimi (kyutai/moshi) streaming at 12.5 Hz: one frame per stream and level, K = 2048, D = 256.
    Case("mimi-1", "Mimi streaming, 1 frame", (1,), 2048, 256, source="kyutai/mimi, 1 stream"),
    Case("mimi-8", "Mimi streaming, 8 frames", (8,), 2048, 256, source="kyutai/mimi, 8 streams"),
    Case("mimi-64", "Mimi streaming, 64 frames", (64,), 2048, 256, source="kyutai/mimi, 64 streams"),
    # 256 images of LlamaGen at once: what an N x K matrix costs (4.3 GB in float32).
    Case("llamagen-256", "LlamaGen VQ-16, 256 images", (256, 16, 16), 16384, 8, "cosine", True, source="batch 256"),
)
BY_NAME = {case.name: case for case in CASES}

# What `--all` measures per operation.
SEARCH = tuple(case.name for case in CASES if case.name != "llamagen-256")
TRAIN = ("vqvae-cifar", "vqgan-16384", "llamagen", "encodec")
MEMORY = ("vqgan-16384", "llamagen-256")


def shrink(case: Case) -> Case:
    """A tiny version for ``--quick``: the same layout and metric, at most 512 rows and 512 codes."""
    shape = case.shape
    while math.prod(shape) > 512:
        largest = max(range(len(shape)), key=lambda i: shape[i])
        shape = tuple((s + 1) // 2 if i == largest else s for i, s in enumerate(shape))
    return replace(case, shape=shape, codes=min(case.codes, 512))
