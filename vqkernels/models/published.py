"""Other libraries' names and shapes for a VQGAN in a ``state_dict``, translated into ours.

Called by :meth:`vqkernels.models.VQGAN.load_published`. Layouts, by the keys of a residual block in the encoder:

* ``encoder.down.0.block.0.``: taming-transformers and LDM; decoder levels are numbered finest first
* ``encoder.conv_blocks.0.res.0.``: LlamaGen, whose codes are unit vectors
* ``encoder.down_blocks.0.resnets.0.``: diffusers' ``VQModel``, whose attention has linear layers
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels.models.vqgan_config import VQGANConfig
from vqkernels.nn import checkpoints

__all__ = ["Found", "complete", "infer_config", "translate"]

Rules = tuple[tuple[str, str], ...]

CODEBOOK = "quantizer.codebook"
# Losses, averaged copies and counters of the last tokens seen: none of it is the generator's.
DROPPED = re.compile(r"(loss|model_ema|lpips|discriminator)\.|colorize$|quantize\.(used|codebook_used|re_embed)$")


def _rules(level: str, block: str, attention: str, resample: str, middle: tuple[str, str, str]) -> Rules:
    """What a layout calls a level, its parts, and the three layers in the middle: regular expressions."""
    return (
        (rf"^{level}\.(\d+)\.{block}\.(\d+)\.", r"levels.\1.blocks.\2."),
        (rf"^{level}\.(\d+)\.{attention}\.(\d+)\.", r"levels.\1.attention.\2."),
        (rf"^{level}\.(\d+)\.{resample}\.", r"levels.\1.resample."),
        *((rf"^{theirs}\.", f"middle.{ours}.") for theirs, ours in zip(middle, MIDDLE, strict=True)),
    )


# Pattern and replacement per layout, applied in order to the part after "encoder." or "decoder.".
MIDDLE = ("first", "attention", "second")
SAMPLE = "(?:down|up)sample"
RULES: dict[str, Rules] = {
    "taming": _rules("(?:down|up)", "block", "attn", SAMPLE, (r"mid\.block_1", r"mid\.attn_1", r"mid\.block_2")),
    "llamagen": _rules("conv_blocks", "res", "attn", SAMPLE, (r"mid\.0", r"mid\.1", r"mid\.2")),
    "diffusers": (
        *_rules(
            "(?:down|up)_blocks", "resnets", "attentions", rf"{SAMPLE}rs\.0",
            (r"mid_block\.resnets\.0", r"mid_block\.attentions\.0", r"mid_block\.resnets\.1"),
        ),
        (r"^conv_norm_out\.", "norm_out."),
    ),
}  # fmt: skip
# The same for every layout: names inside a block. diffusers named its attention layers anew in version 0.15.
INNER = (
    (r"\.(?:nin|conv)_shortcut\.", ".shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."),
    (r"\.(?:to_v|value)\.", ".v."),
    (r"\.(?:proj_out|proj_attn|to_out\.0)\.", ".project."),
)


@dataclass(frozen=True)
class Found:
    """A translated ``state_dict``: our names, and the layout that it had."""

    layout: str
    tensors: dict[str, Tensor]


def _layout(state: Mapping[str, Tensor]) -> str:
    for layout, key in (
        ("taming", "encoder.down.0.block.0.conv1.weight"),
        ("llamagen", "encoder.conv_blocks.0.res.0.conv1.weight"),
        ("diffusers", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    ):
        if key in state:
            return layout
    some = ", ".join(sorted(state)[:3]) or "nothing"
    raise ValueError(f"no known VQGAN layout; expected keys of taming, LlamaGen or diffusers, found {some}, ...")


def translate(state: Mapping[str, Tensor]) -> Found:
    """Our names for a published ``state_dict``.

    Args:
        state: as stored; a mapping below ``state_dict`` or ``model`` is looked into.

    Returns:
        The tensors in float32, without those of losses and averaged copies.

    Raises:
        ValueError: the layout is unknown, or it has no codebook of the usual name.
    """
    for outer in ("state_dict", "model"):
        if isinstance(inner := state.get(outer), Mapping):
            state = inner
    layout = _layout(state)
    own = {key: t for key, t in state.items() if not DROPPED.match(key)}
    if "quantize.embedding.weight" not in own:
        raise ValueError(f"the {layout} state_dict has no quantize.embedding.weight; expected a nearest-code quantizer")
    # taming numbers the decoder's levels finest first, everybody else coarsest first.
    ups = [int(m.group(1)) for key in own if (m := re.match(r"decoder\.up\.(\d+)\.", key))]
    depth = max(ups, default=-1) + 1
    tensors = {}
    for key, value in own.items():
        name = _translate_key(key, layout, depth, own)
        is_linear = value.dim() == 2 and re.search(r"\.(q|k|v|project)\.weight$", name)
        tensors[name] = (value[..., None, None] if is_linear else value).float()
    return Found(layout, tensors)


def _translate_key(key: str, layout: str, depth: int, state: Mapping[str, Tensor]) -> str:
    if key == "quantize.embedding.weight":
        return CODEBOOK
    half, _, rest = key.partition(".")
    if half not in ("encoder", "decoder"):
        return key
    for pattern, replacement in (*RULES[layout], *INNER):
        rest = re.sub(pattern, replacement, rest)
    if half == "decoder" and depth:
        rest = re.sub(r"^levels\.(\d+)", lambda m: f"levels.{depth - 1 - int(m.group(1))}", rest)
    has_attention = any(re.match(rf"{half}\.(mid\.attn_1|mid\.1\.q|mid_block\.attentions)\.", k) for k in state)
    places = {"first": 0, "attention": 1, "second": 2 if has_attention else 1}
    rest = re.sub(r"^middle\.(first|attention|second)", lambda m: f"middle.{places[m.group(1)]}", rest)
    return f"{half}.{rest}"


def complete(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The translated tensors with statistics that agree with the codebook, for those that the model keeps.

    Args:
        tensors: of :func:`translate`.
        expected: the model's ``state_dict``.
    """
    codes = tensors[CODEBOOK]
    statistics = checkpoints.defaults(codes, None)
    statistics |= {
        "code_counts": torch.zeros(codes.shape[:-1], dtype=torch.int64),
        "steps": torch.zeros((), dtype=torch.int64),
    }
    filled = {f"quantizer.{name}": value for name, value in statistics.items()}
    return {name: value for name, value in filled.items() if name in expected} | dict(tensors)


def infer_config(found: Found, norm_groups: int = 32) -> VQGANConfig:
    """The sizes that a translated state_dict has.

    Args:
        found: of :func:`translate`.
        norm_groups: which no tensor tells.

    Raises:
        ValueError: widths are no multiples of the first one, or encoder and decoder differ.
    """
    t = found.tensors
    channels = t["encoder.conv_in.weight"].shape[0]

    def count(pattern: str) -> int:
        return 1 + max((int(m.group(1)) for k in t if (m := re.match(pattern, k))), default=-1)

    levels = count(r"encoder\.levels\.(\d+)\.")
    widths = [t[f"encoder.levels.{i}.blocks.0.conv1.weight"].shape[0] for i in range(levels)]
    if bad := [w for w in widths if w % channels]:
        raise ValueError(f"a level is {bad[0]} wide; expected a multiple of the {channels} channels of encoder.conv_in")
    codes, dim = t[CODEBOOK].shape
    return VQGANConfig(
        image_channels=t["encoder.conv_in.weight"].shape[1],
        channels=channels,
        multipliers=tuple(w // channels for w in widths),
        blocks=count(r"encoder\.levels\.0\.blocks\.(\d+)\."),
        decoder_blocks=count(r"decoder\.levels\.0\.blocks\.(\d+)\."),
        attention_factors=tuple(1 << i for i in range(levels) if f"encoder.levels.{i}.attention.0.q.weight" in t),
        middle_attention="encoder.middle.2.conv1.weight" in t,
        z_channels=t["encoder.conv_out.weight"].shape[0],
        codes=codes,
        dim=dim,
        resample_with_conv=levels == 1 or "encoder.levels.0.resample.conv.weight" in t,
        quantizer={"metric": "cosine"} if found.layout == "llamagen" else {},
        norm_groups=norm_groups,
    )
