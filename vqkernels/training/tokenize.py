"""Images to token shards: resumable, shared out over processes, the same bytes whatever the batch and the processes.

Called by :mod:`vqkernels.cli.tokenize`. The search is exact, so tokens depend on the encoder's output alone; that
output must not depend on the company an image keeps. Convolutions and matrix products round differently for other batch
sizes and thread counts (measured: most of a VQGAN's latents change in the last bits), so every image is encoded by
itself, on one thread; ``workers`` images at a time run side by side.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vqkernels._files import sweep
from vqkernels.models import TokenModel, load_model
from vqkernels.models.pretrained import CONFIG_NAME, WEIGHTS_NAME
from vqkernels.training.config import TrainingError, require
from vqkernels.training.image_source import ImageSource, fit, open_source
from vqkernels.training.run_folder import check_output, write_json
from vqkernels.training.token_shards import FORMATS, VERSION, ImageTokens, Shard, read_shard, sha256, write_shard

__all__ = [
    "MANIFEST",
    "TokenizeConfig",
    "model_digest",
    "one_thread",
    "open_saved",
    "process",
    "side_by_side",
    "tokenize",
]

PLAN, MANIFEST = "plan.json", "manifest.json"


@dataclass(frozen=True)
class TokenizeConfig:
    """One tokenisation.

    Args:
        model: folder written by ``save_pretrained`` (or by ``vqkernels train``, below ``model/``).
        images: see :func:`vqkernels.training.image_source.open_source`; ``None`` for the built-in photographs.
        output: folder of the shards.
        size: scale the shorter side to this and cut out the middle square; ``None``: the images' own pixels, cut to a
            multiple of what the model needs, so that images may differ in size.
        column, split: of a data set.
        shard_size: images per shard.
        format: "safetensors" or "parquet".
        batch_size: images that are read ahead; changes memory and speed, never a token.
        workers: images that are encoded side by side, one thread each; ``None``: as many as torch has threads.
        device: "cpu", "cuda" or "auto".

    Raises:
        TrainingError: a value is out of range.
    """

    model: str
    images: str | None = None
    output: str = "tokens"
    size: int | None = None
    column: str = "image"
    split: str = "train"
    shard_size: int = 1024
    format: str = "safetensors"
    batch_size: int = 64
    workers: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("size", "shard_size", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise TrainingError(f"{name} is {value!r}; expected an integer of at least 1")
        if self.format not in FORMATS:
            raise TrainingError(f"format is {self.format!r}; expected one of {', '.join(FORMATS)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise TrainingError(f"device is {self.device!r}; expected auto, cpu or cuda")


def tokenize(config: TokenizeConfig, *, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Tokenise; shards that are there already and whole are kept, so that the same call goes on after an interruption.

    Args:
        config: what to do. Under ``torchrun`` or ``accelerate launch`` process r of R takes every R-th shard.
        say: receives lines of text for the user.

    Returns:
        The manifest, if this process finished the last shard; else ``None``.

    Raises:
        TrainingError: something the user can put right.
    """
    require("safetensors.torch")
    rank, world = process()
    if config.format == "parquet":
        require("pyarrow.parquet", "data")
    folder, model, digest = _open_model(config)
    source = open_source(config.images, size=config.size, column=config.column, split=config.split)
    count = -(-len(source.names) // config.shard_size)
    plan = {
        "version": VERSION,
        "model": digest,
        "streams": [asdict(s) for s in model.streams],
        "images": source.fingerprint,
        "count": len(source.names),
        "size": config.size,
        "shard_size": config.shard_size,
        "format": config.format,
    }
    paths = [folder / f"tokens-{i:05d}-of-{count:05d}.{config.format}" for i in range(count)]
    _claim(folder, plan)
    say(f"{source.what}: {count} shards" + (f", process {rank} of {world}" if world > 1 else ""))
    began, done, images, tokens = time.perf_counter(), 0, 0, 0
    progress = require("tqdm").tqdm(
        total=sum(len(_members(source, config, i)) for i in range(rank, count, world)),
        unit="image", desc="tokenizing", disable=rank != 0, dynamic_ncols=True,
    )  # fmt: skip
    with progress, one_thread() as threads, side_by_side(config.workers or threads) as pool:
        for number in range(rank, count, world):
            members = _members(source, config, number)
            if paths[number].exists():
                try:
                    read_shard(paths[number])
                except TrainingError as e:
                    say(f"{e}; making it again")
                else:
                    progress.update(len(members))
                    continue
            shard = _make_shard(number, members, source, config, model, digest, pool, progress.update)
            write_shard(paths[number], shard)
            done, images, tokens = done + 1, images + len(shard.images), tokens + shard.tokens
    seconds = time.perf_counter() - began
    for name, reason in source.skipped if rank == 0 else ():
        say(f"skipped {name}: {reason}")
    say(
        f"{images} images, {tokens} tokens in {seconds:.1f} s "
        f"({images / max(seconds, 1e-9):.1f} images/s, {tokens / max(seconds, 1e-9):.0f} tokens/s), {done} new shards"
    )
    # Whoever renames the last shard sees all of them; two who do write the same bytes.
    if not all(path.exists() for path in paths):
        return None
    return _write_manifest(folder, plan, paths, source, say)


def process() -> tuple[int, int]:
    """Rank and number of processes, as ``torchrun`` and ``accelerate launch`` tell them.

    Raises:
        TrainingError: the environment says something impossible.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise TrainingError(f"RANK is {rank!r} and WORLD_SIZE is {world!r}; expected 0 <= RANK < WORLD_SIZE")
    return int(rank), int(world)


@contextmanager
def side_by_side(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for work that is dropped, not waited for, where an error or Ctrl-C ends the block."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[int]:
    """One thread within an operation, however many there were (which is what it gives): sums then have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def model_digest(folder: str | Path) -> str:
    """SHA-256 over the two files of a saved model."""
    return f"{sha256(Path(folder) / CONFIG_NAME)[:32]}{sha256(Path(folder) / WEIGHTS_NAME)[:32]}"


def open_saved(folder: str, device: str) -> tuple[TokenModel, str]:
    """A saved model in evaluation mode, and its digest; ``folder`` may also be the run folder around it.

    Raises:
        TrainingError: there is none, it is damaged, or the device cannot be used.
    """
    inner = Path(folder) / "model"
    path = inner if (inner / CONFIG_NAME).exists() else Path(folder)
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device is 'cuda', which torch cannot use on this machine")
    where = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    try:
        return load_model(path, where), model_digest(path)
    except (OSError, ValueError, ImportError) as e:
        raise TrainingError(str(e)) from e


def _open_model(config: TokenizeConfig) -> tuple[Path, TokenModel, str]:
    folder = Path(config.output)
    check_output(folder)
    model, digest = open_saved(config.model, config.device)
    if config.size is not None and config.size % model.multiple:
        raise TrainingError(f"size is {config.size}; expected a multiple of {model.multiple}, which this model needs")
    return folder, model, digest


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or check that the folder holds shards of this very plan."""
    path = folder / PLAN
    try:
        if path.exists():
            old = json.loads(path.read_text())
            changed = [k for k in plan if not isinstance(old, dict) or old.get(k) != plan[k]]
            if changed:
                raise TrainingError(
                    f"{folder} already holds tokens of another call ({', '.join(changed)} differ): "
                    "use another --output, or remove the folder"
                )
            sweep(folder)
            return
        if folder.exists() and any(folder.glob("tokens-*")):
            raise TrainingError(f"{folder} holds tokens but no {PLAN}: use another --output, or remove the folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)
    except ValueError as e:
        raise TrainingError(f"{path} is damaged: {e}") from e
    except OSError as e:
        raise TrainingError(f"output {folder} cannot be written: {e.strerror or e}") from e


def _members(source: ImageSource, config: TokenizeConfig, number: int) -> range:
    return range(number * config.shard_size, min((number + 1) * config.shard_size, len(source.names)))


def _make_shard(
    number: int,
    members: range,
    source: ImageSource,
    config: TokenizeConfig,
    model: TokenModel,
    digest: str,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], Any],
) -> Shard:
    device = next(model.parameters()).device

    def encode(index: int) -> ImageTokens | tuple[str, str]:
        name = source.names[index]
        try:
            image = fit(source.load(index), model.multiple, config.size)
        except Exception as e:  # decoders raise whatever the damage makes them raise
            return name, " ".join(str(e).split()) or type(e).__name__
        with torch.inference_mode():
            found = model.encode_to_indices(image[None].to(device))
        return ImageTokens(name, image.shape[1], image.shape[2], tuple(t[0].cpu() for t in found))

    images: list[ImageTokens] = []
    skipped: list[tuple[str, str]] = []
    for start in range(0, len(members), config.batch_size):
        for found in pool.map(encode, members[start : start + config.batch_size]):
            if isinstance(found, ImageTokens):
                images.append(found)
            else:
                skipped.append(found)
            advance(1)
    return Shard(number, digest, model.streams, tuple(images), tuple(skipped))


def _write_manifest(
    folder: Path, plan: dict[str, Any], paths: list[Path], source: ImageSource, say: Callable[[str], None]
) -> dict[str, Any]:
    shards, skipped = [], [list(pair) for pair in source.skipped]
    for path in paths:
        shard = read_shard(path)
        shards.append({
            "file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size,
            "images": len(shard.images), "tokens": shard.tokens,
        })  # fmt: skip
        skipped += [list(pair) for pair in shard.skipped]
    manifest = {**plan, "shards": shards, "skipped": skipped}
    manifest["images_done"] = sum(s["images"] for s in shards)
    manifest["tokens"] = sum(s["tokens"] for s in shards)
    if manifest["images_done"] == 0:
        say(f"no image could be read; first {skipped[0][0]}: {skipped[0][1]}" if skipped else "there was no image")
    elif skipped:
        say(f"skipped {len(skipped)} images, listed in {MANIFEST}; first {skipped[0][0]}: {skipped[0][1]}")
    write_json(folder / MANIFEST, manifest)
    say(f"wrote {folder / MANIFEST}: {manifest['images_done']} images, {manifest['tokens']} tokens")
    return manifest
