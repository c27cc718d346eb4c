"""The audio codecs of transformers: EnCodec and its copies (Higgs Audio 2, WavTokenizer, X-Codec), Mimi, DAC.

Read by :mod:`vqkernels.patch`. The first four only encode and decode (no losses, no updates), DAC also trains.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vqkernels.functional import nearest
from vqkernels.recognisers._adapter import Adapter

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


ADAPTERS = (EncodecCodebook, DacQuantizer)
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
