"""One row per class that ``patch`` knows, for the tests that every class must pass (``test_table.py``).

Codes lie as far apart as the inputs, as after training, so that no formula is in doubt; :func:`shrink` makes the
opposite. Rows of installed libraries are built when asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from restated import Descript, EncodecCodebook, EncodecLevels, LlamaGen, MoshiCodebook, Taming1, Taming2, TamingEma
from restated_tokenizers import Ibq, RepositorySimVQ, RepositorySimVQ1D, Var
from test_codebooks import FAMILY, transformers_class
from torch import Tensor, nn

K, D = 37, 6
CODES = ("embedding.weight", "codebook.weight", "embed", "embed_avg", "embed_sum", "embedding_sum", "frozen_codebook")


def _call(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def _encode(module: Any, x: Tensor) -> Any:
    return module.encode(x)


@dataclass(frozen=True)
class Row:
    """A class.

    Attributes:
        make: an instance.
        shape: of its input; ``channels`` is the dim that must fit the codes.
        call: what is compared.
        family: the module of ``vqkernels.recognisers``.
        trains: whether it has losses, gradients or statistics at all.
        wide: whether the original runs in float64.
        group: whether the original wants a process group.
        speaks: whether it stands for its family where one of each is enough.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    channels: int
    family: str
    call: Callable[[Any, Tensor], Any] = _call
    trains: bool = True
    wide: bool = True
    group: bool = False
    speaks: bool = False


def _audio(model: str) -> Row:
    config = SimpleNamespace(codebook_size=K, codebook_dim=D)
    return Row(
        lambda: transformers_class(model, FAMILY[model])(config),
        (3, 41, D), 2, "transformers_audio", _encode, trains=False, wide=model != "mimi",
    )  # fmt: skip


def _levels(model: str, name: str, hidden: int = D) -> Row:
    config = SimpleNamespace(
        codebook_size=K, codebook_dim=D, num_quantizers=4, frame_rate=75, num_semantic_quantizers=1,
        vector_quantization_hidden_dimension=D, hidden_size=hidden,
    )  # fmt: skip
    return Row(
        lambda: transformers_class(model, name)(config),
        (3, hidden, 41), 1, "transformers_audio", _encode, trains=False, wide=model != "mimi",
    )  # fmt: skip


def _image(model: str, name: str) -> Row:
    config = SimpleNamespace(num_embeddings=K, embed_dim=D, beta=0.3, num_patches=3)
    return Row(
        lambda: transformers_class(model, name)(config),
        (3, D, 7, 9), 1, "transformers_image", speaks=model == "chameleon",
    )  # fmt: skip


def _emu3() -> nn.Module:
    return transformers_class("emu3", "Emu3VQVAEVectorQuantizer")(SimpleNamespace(codebook_size=K, embed_dim=D))


def _dac() -> nn.Module:
    config = SimpleNamespace(hidden_size=11, codebook_dim=D, codebook_size=K)
    return transformers_class("dac", "DacVectorQuantize")(config)


def _diffusers(**options: Any) -> nn.Module:
    from diffusers.models.autoencoders.vae import VectorQuantizer

    return VectorQuantizer(K, D, 0.25, **options)


def _lucidrains(name: str, **options: Any) -> Row:
    def make() -> nn.Module:
        import vector_quantize_pytorch as library

        module: nn.Module = getattr(library, name)(dim=D, codebook_size=K, **options)
        return module

    return Row(make, (3, 41, D), 2, "vector_quantize_pytorch", wide=False, speaks=name == "VectorQuantize")


_MAP = (3, D, 7, 9)
ROWS: dict[str, Row] = {
    "vector-quantize-pytorch VectorQuantize": _lucidrains("VectorQuantize"),
    "vector-quantize-pytorch ResidualVQ": _lucidrains("ResidualVQ", num_quantizers=3),
    "vector-quantize-pytorch SimVQ": _lucidrains("SimVQ"),
    **{f"transformers {model}": _audio(model) for model in FAMILY},
    "transformers EnCodec levels": _levels("encodec", "EncodecResidualVectorQuantizer"),
    "transformers X-Codec levels": _levels("xcodec", "XcodecResidualVectorQuantization"),
    "transformers Mimi levels": _levels("mimi", "MimiResidualVectorQuantizer"),
    "transformers Mimi levels, projected": _levels("mimi", "MimiSplitResidualVectorQuantizer", 11),
    "transformers DAC": Row(_dac, (3, 11, 29), 1, "transformers_audio", speaks=True),
    "transformers Chameleon": _image("chameleon", "ChameleonVQVAEVectorQuantizer"),
    "transformers Janus": _image("janus", "JanusVQVAEVectorQuantizer"),
    "transformers GLM-Image": _image("glm_image", "GlmImageVQVAEVectorQuantizer"),
    "transformers Emu3": Row(_emu3, (2, 3, D, 4, 5), 2, "transformers_image", trains=False),
    "diffusers": Row(_diffusers, _MAP, 1, "taming", speaks=True),
    "diffusers, beta done right": Row(lambda: _diffusers(legacy=False, sane_index_shape=True), _MAP, 1, "taming"),
    "re-stated taming 2": Row(lambda: Taming2(K, D, 0.25), _MAP, 1, "taming"),
    "re-stated taming 1": Row(lambda: Taming1(K, D, 0.25), _MAP, 1, "taming"),
    "re-stated taming EMA": Row(lambda: TamingEma(K, D, 0.25, decay=0.9), _MAP, 1, "taming"),
    "re-stated LlamaGen": Row(lambda: LlamaGen(K, D, 0.25, 0.0, True, True), _MAP, 1, "llamagen", speaks=True),
    "re-stated LlamaGen, entropy": Row(lambda: LlamaGen(K, D, 0.25, 0.1, False, False), _MAP, 1, "llamagen"),
    "re-stated descript": Row(lambda: Descript(11, K, D), (3, 11, 29), 1, "codecs"),
    "re-stated EnCodec": Row(lambda: EncodecCodebook(D, K, decay=0.9), (3, 41, D), 2, "codecs", speaks=True),
    "re-stated EnCodec levels": Row(
        lambda: EncodecLevels(2, dim=D, codebook_size=K, kmeans_init=True, kmeans_iters=3), (3, D, 41), 1, "codecs"
    ),
    "re-stated Moshi": Row(lambda: MoshiCodebook(D, K), (3, 41, D), 2, "codecs"),
    "re-stated SimVQ": Row(lambda: RepositorySimVQ(K, D), _MAP, 1, "simvq", speaks=True),
    "re-stated SimVQ, beta done right": Row(lambda: RepositorySimVQ(K, D, 0.3, True, False), _MAP, 1, "simvq"),
    "re-stated SimVQ 1D": Row(lambda: RepositorySimVQ1D(K, D), (3, D, 41), 1, "simvq"),
    "re-stated VAR": Row(
        lambda: Var(K, D, False, (1, 2, 5)), (2, D, 5, 5), 1, "var", wide=False, group=True, speaks=True
    ),
    "re-stated VAR, by angle": Row(
        lambda: Var(K, D, True, (1, 3, 4, 5)), (2, D, 5, 5), 1, "var", wide=False, group=True
    ),
    "re-stated IBQ": Row(lambda: Ibq(K, D), _MAP, 1, "ibq", speaks=True),
    "re-stated IBQ, entropies": Row(lambda: Ibq(K, D, 0.3, 0.5), _MAP, 1, "ibq"),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """An instance whose codes lie as far apart as its inputs."""
    torch.manual_seed(4)
    module = ROWS[name].make()
    for path, tensor in _codes(module):
        if "VectorQuantize" not in name and "ResidualVQ" not in name and name != "re-stated EnCodec levels":
            tensor.data.normal_(std=0.6 if path.endswith("frozen_codebook") else 1.0)
    return module


def shrink(module: nn.Module) -> None:
    """Codes of U(-1/K, 1/K), the usual start, among large latents: the hardest case for a distance formula."""
    for path, tensor in _codes(module):
        if not path.endswith("embed_avg"):
            tensor.data.uniform_(-1 / K, 1 / K)


def _codes(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(path, t) for path, t in named if f".{path}".endswith(tuple(f".{name}" for name in CODES))]


def batch(name: str, seed: int = 0) -> Tensor:
    """An input."""
    return torch.randn(ROWS[name].shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def group_for(name: str) -> Iterator[None]:
    """A process group of one, where the original cannot do without."""
    if not ROWS[name].group:
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
