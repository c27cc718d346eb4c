"""Quantizers that only exist as repositories, patched and compared with the repositories' own files.

The tests compare with re-statements of these classes; this compares with the classes. Run
``python -m benchmarks.patched_repositories CHECKOUT ...`` with git checkouts (bare ones do) of any of the repositories
below; einops is needed. For each class five training steps and an evaluation, as in ``tests/patch/test_table.py``:
indices equal, results, gradients, parameters and buffers within 1e-5 of the largest value.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

K, D = 37, 6
TOLERANCE = 1e-5

# Files of each repository, by the path that they are imported from.
FILES: dict[str, dict[str, str]] = {
    "VAR": {"models/quant.py": "models/quant.py"},
    "SimVQ": {"taming/modules/vqvae/quantize.py": "simvq/modules/vqvae/quantize.py"},
    "SEED-Voken": {"src/IBQ/modules/vqvae/quantize.py": "src/IBQ/modules/vqvae/quantize.py"},
    "taming-transformers": {"taming/modules/vqvae/quantize.py": "taming/modules/vqvae/quantize.py"},
    "LlamaGen": {"tokenizer/tokenizer_image/vq_model.py": "tokenizer/tokenizer_image/vq_model.py"},
    "descript-audio-codec": {"dac/nn/quantize.py": "dac/nn/quantize.py", "dac/nn/layers.py": "dac/nn/layers.py"},
    "encodec": {
        "encodec/quantization/core_vq.py": "encodec/quantization/core_vq.py",
        "encodec/distrib.py": "encodec/distrib.py",
    },
    "audiocraft": {"audiocraft/quantization/core_vq.py": "audiocraft/quantization/core_vq.py"},
    "moshi": {"moshi/moshi/quantization/core_vq.py": "moshi/quantization/core_vq.py"},
}
_MAP, _AUDIO = (3, D, 7, 9), (3, D, 41)
_LEVELS = {"num_quantizers": 3, "dim": D, "codebook_size": K}
_EXPIRY = {**_LEVELS, "kmeans_init": True, "kmeans_iters": 4, "threshold_ema_dead_code": 2}


def _var(by_angle: bool, shared: int) -> Callable[[Any], nn.Module]:
    return lambda m: m.VectorQuantizer2(K, D, by_angle, v_patch_nums=(1, 2, 3, 5), share_quant_resi=shared)


# name -> repository, module, constructor, shape of the input
CASES: dict[str, tuple[str, str, Callable[[Any], nn.Module], tuple[int, ...]]] = {
    **{
        f"VAR, {'by angle' if by_angle else 'l2'}, share_quant_resi={shared}": (
            "VAR", "models.quant", _var(by_angle, shared), (2, D, 5, 5)
        )
        for by_angle in (False, True) for shared in (0, 1, 4)
    },
    "SimVQ": ("SimVQ", "simvq.modules.vqvae.quantize", lambda m: m.SimVQ(K, D), _MAP),
    "SimVQ, legacy=False": (
        "SimVQ", "simvq.modules.vqvae.quantize", lambda m: m.SimVQ(K, D, sane_index_shape=True, legacy=False), _MAP
    ),
    "SimVQ1D": ("SimVQ", "simvq.modules.vqvae.quantize", lambda m: m.SimVQ1D(K, D), _AUDIO),
    "IBQ": ("SEED-Voken", "src.IBQ.modules.vqvae.quantize", lambda m: m.IndexPropagationQuantize(K, D), _MAP),
    "IBQ, entropies": (
        "SEED-Voken",
        "src.IBQ.modules.vqvae.quantize",
        # At its temperature of 0.01 both are further than this from float64, the patched one a little less.
        lambda m: m.IndexPropagationQuantize(K, D, use_entropy_loss=True, entropy_temperature=0.5),
        _MAP,
    ),
    "taming 1": ("taming-transformers", "taming.modules.vqvae.quantize", lambda m: m.VectorQuantizer(K, D, 0.25), _MAP),
    "taming 2": (
        "taming-transformers", "taming.modules.vqvae.quantize", lambda m: m.VectorQuantizer2(K, D, 0.25), _MAP
    ),
    "taming 2, legacy=False": (
        "taming-transformers",
        "taming.modules.vqvae.quantize",
        lambda m: m.VectorQuantizer2(K, D, 0.25, legacy=False, sane_index_shape=True),
        _MAP,
    ),
    "LlamaGen": (
        "LlamaGen",
        "tokenizer.tokenizer_image.vq_model",
        lambda m: m.VectorQuantizer(K, D, 0.25, 0.0, True, False),
        _MAP,
    ),
    "LlamaGen, entropy": (
        "LlamaGen",
        "tokenizer.tokenizer_image.vq_model",
        lambda m: m.VectorQuantizer(K, D, 0.25, 0.1, True, False),
        _MAP,
    ),
    "descript-audio-codec": (
        "descript-audio-codec",
        "dac.nn.quantize",
        lambda m: m.ResidualVectorQuantize(11, 3, K, D, quantizer_dropout=0.5),
        (4, 11, 29),
    ),
    "EnCodec": (
        "encodec", "encodec.quantization.core_vq", lambda m: m.ResidualVectorQuantization(**_EXPIRY), _AUDIO
    ),
    "AudioCraft": (
        "audiocraft", "audiocraft.quantization.core_vq", lambda m: m.ResidualVectorQuantization(**_EXPIRY), _AUDIO
    ),
    "Moshi": (
        "moshi",
        "moshi.quantization.core_vq",
        # One level: of those that wait for their start docs/drop-in.md says what differs.
        lambda m: m.ResidualVectorQuantization(**{**_LEVELS, "num_quantizers": 1}, codebook_offset=0),
        _AUDIO,
    ),
}  # fmt: skip


def lay_out(checkouts: list[Path], folder: Path) -> dict[str, str]:
    """Copy the files that are there; repository -> commit."""
    found = {}
    for checkout in checkouts:

        def git(*arguments: str, where: Path = checkout) -> str:
            return subprocess.run(
                ["git", "-C", str(where), *arguments], capture_output=True, text=True, check=True
            ).stdout

        names = set(git("ls-tree", "-r", "--name-only", "HEAD").splitlines())
        for repository, files in FILES.items():
            marks = {"SimVQ": "class SimVQ(", "taming-transformers": "class GumbelQuantize"}
            if set(files) <= names and marks.get(repository, "") in git("show", f"HEAD:{next(iter(files))}"):
                for source, target in files.items():
                    (folder / target).parent.mkdir(parents=True, exist_ok=True)
                    (folder / target).write_text(git("show", f"HEAD:{source}"))
                found[repository] = git("rev-parse", "--short", "HEAD").strip()
    return found


def _flatten(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else []
    return [t for part in parts for t in _flatten(part)]


def _step(module: nn.Module, x: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of the input and of the parameters."""
    torch.manual_seed(seed)
    module.zero_grad()
    x = x.clone().requires_grad_()
    results = _flatten(module(x))
    wanted = [t for t in results if t.requires_grad]
    if wanted:
        sum(((i + 1) * t.double().sin().sum() for i, t in enumerate(wanted)), torch.zeros(())).backward()
    return results, [p.grad for p in (x, *module.parameters()) if p.grad is not None]


def _error(expected: Tensor, found: Tensor) -> float:
    """Of the largest value; infinite for other indices."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, found) else float("inf")
    scale = max(float(expected.detach().abs().max()), 1e-6) if expected.numel() else 1.0
    return float((expected - found).detach().abs().max()) / scale if expected.numel() else 0.0


def compare(name: str) -> float:
    """The largest error of one case."""
    import vqkernels

    _, path, construct, shape = CASES[name]
    module = importlib.import_module(path)
    pair = []
    for patched in (False, True):
        torch.manual_seed(0)
        quantizer = construct(module).train()
        for key, value in quantizer.named_parameters():
            if key.endswith(("embedding.weight", "codebook.weight")):
                value.data.normal_()
        if patched:
            assert vqkernels.patch(quantizer, strict=True).replaced
        pair.append(quantizer)
    trained = [[p for p in q.parameters() if p.requires_grad] for q in pair]
    optimizers = [torch.optim.SGD(p, lr=2e-3) if p else None for p in trained]
    worst = 0.0
    for step in range(6):
        if step == 5:
            pair[0].eval(), pair[1].eval()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        x = x.transpose(1, -1).contiguous().transpose(1, -1) if step % 2 else x
        (expected, expected_grads), (found, grads) = (_step(q, x, step) for q in pair)
        for optimizer in optimizers:
            if optimizer is not None and step < 5:
                optimizer.step()
        states = [list(q.state_dict().values()) for q in pair]
        compared = zip([*expected, *expected_grads, *states[0]], [*found, *grads, *states[1]], strict=True)
        for a, b in compared:
            if a.is_floating_point() and not a.isfinite().all():
                raise RuntimeError(f"{name}: the training itself diverged")
            worst = max(worst, _error(a, b))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path, help=f"of any of {', '.join(FILES)}")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        commits = lay_out(arguments.checkouts, Path(folder))
        sys.path.insert(0, folder)
        # What these files import besides torch and einops, for one process.
        flashy, dist = types.ModuleType("flashy"), types.ModuleType("dist")
        flashy.distrib = types.SimpleNamespace(broadcast_tensors=lambda *_: None)  # type: ignore[attr-defined]
        dist.initialized = lambda: True  # type: ignore[attr-defined]
        sys.modules |= {"flashy": flashy, "dist": dist}
        errors = {name: compare(name) for name, case in CASES.items() if case[0] in commits}
    text = json.dumps({"commits": commits, "tolerance": TOLERANCE, "largest_error": errors}, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.exit(not errors or any(error > TOLERANCE for error in errors.values()))


if __name__ == "__main__":
    main()
