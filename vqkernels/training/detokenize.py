"""Token shards back to images: checks every shard, writes one PNG per image in one step, goes on where it stopped.

Called by :mod:`vqkernels.cli.detokenize`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from vqkernels._files import replace_file, sweep
from vqkernels.models import TokenModel
from vqkernels.training.config import TrainingError, require
from vqkernels.training.run_folder import check_output
from vqkernels.training.token_shards import VERSION, ImageTokens, Shard, read_shard, sha256
from vqkernels.training.tokenize import MANIFEST, one_thread, open_saved, process, side_by_side

__all__ = ["detokenize", "read_manifest"]


def detokenize(
    tokens: str,
    model: str,
    output: str,
    *,
    device: str = "auto",
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """Decode every shard of a manifest.

    Args:
        tokens: folder written by :func:`vqkernels.training.tokenize.tokenize`.
        model: the model that made the tokens.
        output: folder of the images; names and folders are those of the originals, as PNG.
        device: "cpu", "cuda" or "auto".
        workers: images decoded side by side; ``None``: as many as torch has threads.
        say: receives lines of text for the user.

    Returns:
        ``written``, ``kept`` (there already) and ``damaged`` (shards left out).

    Raises:
        TrainingError: there are no tokens, they are of another model, or nothing could be written.
    """
    rank, world = process()
    require("PIL.Image")
    folder, target = Path(tokens), Path(output)
    manifest = read_manifest(folder)
    loaded, digest = open_saved(model, device)
    if digest != manifest["model"]:
        raise TrainingError(f"{folder} holds tokens of another model than {model}: their SHA-256 differ")
    if [asdict(s) for s in loaded.streams] != manifest["streams"]:
        raise TrainingError(f"{folder} was made with other token streams than {model} has")
    check_output(target)
    for place, _, _ in os.walk(target):
        sweep(Path(place))
    found = {"written": 0, "kept": 0, "damaged": 0}
    mine = manifest["shards"][rank::world]
    progress = require("tqdm").tqdm(
        total=sum(s["images"] for s in mine), unit="image", desc="decoding", disable=rank != 0, dynamic_ncols=True
    )
    with progress, one_thread() as threads, side_by_side(workers or threads) as pool:
        for entry in mine:
            try:
                shard = _checked(folder / entry["file"], entry)
            except TrainingError as e:
                say(f"left out: {e}")
                found["damaged"] += 1
                progress.update(entry["images"])
                continue
            for new in pool.map(lambda image: _write(image, loaded, target), shard.images):
                found["written" if new else "kept"] += 1
                progress.update()
    say(f"{found['written']} images written to {target}, {found['kept']} were there, {found['damaged']} damaged shards")
    if mine and found["damaged"] == len(mine):
        raise TrainingError(f"every shard in {folder} is damaged")
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished tokenisation.

    Raises:
        TrainingError: there is none, it is damaged, or it is of something else.
    """
    path = folder / MANIFEST
    if not path.exists():
        hint = " (unfinished: call vqkernels tokenize again)" if (folder / "plan.json").exists() else ""
        raise TrainingError(f"{folder} has no {MANIFEST}{hint}")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["version"]
        for entry in manifest["shards"]:
            if not {"file", "sha256", "images"} <= entry.keys():
                raise KeyError("shards")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise TrainingError(f"{path} is damaged: {e!r}") from e
    if version != VERSION:
        raise TrainingError(f"{path} has version {version!r}; expected {VERSION!r}")
    result: dict[str, Any] = manifest
    return result


def _checked(path: Path, entry: dict[str, Any]) -> Shard:
    if path.exists() and sha256(path) != entry["sha256"]:
        raise TrainingError(f"{path} is damaged: its SHA-256 is not the manifest's")
    return read_shard(path)


def _write(image: ImageTokens, model: TokenModel, target: Path) -> bool:
    """Decode and write one image; ``False`` if it is there already."""
    name = PurePosixPath(image.name)
    if name.is_absolute() or ".." in name.parts:  # a shard from elsewhere must not write elsewhere
        raise TrainingError(f"a shard names the image {image.name!r}, outside of the output folder")
    path = target / name.parent / f"{name.name}.png"
    if path.exists():
        return False
    device = next(model.parameters()).device
    with torch.inference_mode():
        pixels = model.decode_indices([t[None].to(device) for t in image.streams])[0]
    array = (pixels.float().clamp(0, 1).cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    require("PIL.Image").fromarray(array).save(buffer, "PNG")
    try:
        os.makedirs(path.parent, exist_ok=True)
        replace_file(path, buffer.getvalue())
    except OSError as e:
        raise TrainingError(f"{path} cannot be written: {e.strerror or e}") from e
    return True
