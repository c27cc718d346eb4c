"""The audio codecs of transformers: EnCodec and its copies (Higgs Audio 2, WavTokenizer, X-Codec), Mimi, DAC.

Read by :mod:`vqkernels.patch`. The first four only encode and decode (no losses, no updates), DAC also trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqkernels.functional import nearest
from vqkernels.levels import residual_nearest
from vqkernels.recognisers._adapter import Adapter, class_path

__all__ = ["ADAPTERS", "IGNORED"]

_MODELS = "transformers.models"


class EncodecCodebook(Adapter):
    """One level's codebook: ``quantize`` (N, D) and ``encode`` (..., D) to indices, read where they lie."""

    targets = (
        f"{_MODELS}.encodec.modeling_encodec.EncodecEuclideanCodebook",
        f"{_MODELS}.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer.HiggsAudioV2TokenizerEuclideanCodebook",
        f"{_MODELS}.mimi.modeling_mimi.MimiEuclideanCodebook",
        f"{_MODELS}.wavtokenizer.modeling_wavtokenizer.WavTokenizerEuclideanCodebook",
        f"{_MODELS}.xcodec.modeling_xcodec.XcodecEuclideanCodebook",
    )
    overrides = ("quantize", "encode")
    signatures: ClassVar = {"quantize": ("hidden_states",), "encode": ("hidden_states",)}
    # Not "embed": Mimi's property keeps what it computes, and would keep it from before a checkpoint is loaded.
    attributes = ("codebook_size",)

    def quantize(self, hidden_states: Tensor) -> Tensor:
        codes: Any = self.embed
        return nearest(hidden_states, codes)[0]

    def encode(self, hidden_states: Tensor) -> Tensor:
        return self.quantize(hidden_states)


# Levels that do nothing but search their codebook and gather from it.
_LEVELS = (
    f"{_MODELS}.encodec.modeling_encodec.EncodecVectorQuantization",
    f"{_MODELS}.mimi.modeling_mimi.MimiVectorQuantization",
    f"{_MODELS}.xcodec.modeling_xcodec.XcodecVectorQuantization",
)


def _changed(level: Any) -> str | None:
    """Why this level must be asked itself, or ``None`` if it and its codebook are the library's own, patched or not."""
    codebook = getattr(level, "codebook", None)
    _, original, _ = getattr(type(codebook), "_vqkernels_key", (None, type(codebook), None))
    for module, cls, known in ((level, type(level), _LEVELS), (codebook, original, EncodecCodebook.targets)):
        if class_path(cls) not in known:
            return f"a level has a {cls.__name__}"
        if found := [name for name in ("encode", "decode", "quantize") if name in vars(module)]:
            return f"{found[0]}() of a level was replaced"
    return None


def _encode(levels: Sequence[Any], x: Tensor) -> Tensor:
    """``x`` (B, D, T) to the indices (Q, B, T) of its levels, in one search where that finds what they would."""
    if len(levels) and all(_changed(level) is None and isinstance(level.codebook, EncodecCodebook) for level in levels):
        codebooks = [level.codebook.embed for level in levels]
        # In half precision the original rounds every residual.
        if x.dtype == torch.float64 or all(codes.dtype == torch.float32 for codes in codebooks):
            return residual_nearest(x.transpose(1, 2), codebooks).indices.movedim(-1, 0)
    found = []
    for level in levels:
        found.append(level.encode(x))
        x = x - level.decode(found[-1])
    return torch.stack(found)


class _Levels(Adapter):
    """All levels of a residual quantizer, held by the first of ``attributes``; codebooks are adapters of their own."""

    overrides = ("encode",)
    attributes: ClassVar[tuple[str, ...]] = ("layers",)

    @classmethod
    def describe(cls, module: Any) -> str:
        levels = getattr(module, cls.attributes[0])
        reason = next(filter(None, map(_changed, levels)), None)
        return f"{len(levels)} levels in one search" if reason is None else f"level by level: {reason}"


class EncodecLevels(_Levels):
    """EnCodec's: latents (B, D, T) to indices (Q, B, T), as many levels as the bandwidth allows."""

    targets: ClassVar[tuple[str, ...]] = (f"{_MODELS}.encodec.modeling_encodec.EncodecResidualVectorQuantizer",)
    signatures: ClassVar = {"encode": ("embeddings", "bandwidth"), "get_num_quantizers_for_bandwidth": ("bandwidth",)}

    def encode(self, embeddings: Tensor, bandwidth: float | None = None) -> Tensor:
        levels = getattr(self, self.attributes[0])
        return _encode(levels[: self.get_num_quantizers_for_bandwidth(bandwidth)], embeddings)


class XcodecLevels(EncodecLevels):
    """X-Codec's, a copy."""

    targets = (f"{_MODELS}.xcodec.modeling_xcodec.XcodecResidualVectorQuantization",)
    attributes = ("quantizers",)


class MimiLevels(_Levels):
    """Mimi's, which are told how many of them to use; a projection leads in."""

    targets = (f"{_MODELS}.mimi.modeling_mimi.MimiResidualVectorQuantizer",)
    signatures: ClassVar = {"encode": ("embeddings", "num_quantizers")}
    attributes = ("layers", "input_proj", "num_quantizers")

    def encode(self, embeddings: Tensor, num_quantizers: int | None = None) -> Tensor:
        module: Any = self
        inside = embeddings if module.input_proj is None else module.input_proj(embeddings)
        return _encode(module.layers[: module.num_quantizers if num_quantizers is None else num_quantizers], inside)


class DacQuantizer(Adapter):
    """One level of DAC: latents (B, D, T) to the raw codes that are nearest by angle, and their indices (B, T)."""

    targets = (f"{_MODELS}.dac.modeling_dac.DacVectorQuantize",)
    overrides = ("decode_latents",)
    signatures: ClassVar = {"decode_latents": ("hidden_states",)}
    attributes = ("codebook",)

    def decode_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        module: Any = self
        if hasattr(module.codebook, "_hf_hook"):  # offloaded weights: the original knows how to bring them here
            original: tuple[Tensor, Tensor] = super().decode_latents(hidden_states)  # type: ignore[misc]
            return original
        indices, _ = nearest(hidden_states.transpose(1, 2), module.codebook.weight, metric="cosine")
        return module.codebook(indices).transpose(1, 2), indices


ADAPTERS = (EncodecCodebook, EncodecLevels, XcodecLevels, MimiLevels, DacQuantizer)
_SPEECH = {
    "wav2vec2": "Wav2Vec2",
    "wav2vec2_conformer": "Wav2Vec2Conformer",
    "wavlm": "WavLM",
    "unispeech": "UniSpeech",
    "unispeech_sat": "UniSpeechSat",
}
IGNORED = {
    f"{_MODELS}.{name}.modeling_{name}.{prefix}GumbelVectorQuantizer": (
        "samples from a softmax over all codes: there is no nearest code to search for"
    )
    for name, prefix in _SPEECH.items()
}
