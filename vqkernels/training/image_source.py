"""Images one by one, by number: a folder, the built-in photographs, or a Hugging Face data set on disk.

Called by :mod:`vqkernels.training.tokenize` and :mod:`vqkernels.training.evaluate`. The order depends on names only,
so that every process and every later call sees the same images under the same numbers.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels.training import data
from vqkernels.training.config import TrainingError, require

__all__ = ["ImageSource", "fit", "open_source"]


@dataclass(frozen=True)
class ImageSource:
    """A fixed sequence of named images.

    Attributes:
        what: for messages.
        names: unique, in order.
        fingerprint: changes when names or sizes of files do.
        load: number to uint8 pixels (H, W, 3); raises whatever the damage makes it raise.
        skipped: (name, reason) of what could not even be listed.
    """

    what: str
    names: Sequence[str]
    fingerprint: str
    load: Callable[[int], data.Pixels]
    skipped: tuple[tuple[str, str], ...] = ()


def open_source(
    images: str | None, *, size: int | None = None, column: str = "image", split: str = "train"
) -> ImageSource:
    """List images.

    Args:
        images: a folder of image files (searched recursively), a folder written by ``datasets.save_to_disk`` or holding
            parquet, arrow or WebDataset tar files for ``datasets.load_dataset``, or ``None`` for the built-in
            photographs.
        size: scale the shorter side to this; ``None`` keeps the pixels.
        column: of a data set, with the images.
        split: of a data set.

    Raises:
        TrainingError: there is no such folder, or nothing in it is an image.
    """
    if images is None:
        return _photographs(size)
    root = Path(images)
    if not root.exists():
        raise TrainingError(f"there is no folder {images}")
    if not root.is_dir():
        raise TrainingError(f"{images} is not a folder")
    if (root / "dataset_info.json").exists() or (root / "dataset_dict.json").exists():
        return _dataset(root, require("datasets", "data").load_from_disk(str(root)), size, column, split)
    tables = {"parquet": "parquet", "arrow": "arrow", "tar": "webdataset"}
    for suffix, builder in tables.items():
        if files := sorted(str(p) for p in root.glob(f"*.{suffix}")):
            loaded = require("datasets", "data").load_dataset(builder, data_files={split: files})
            return _dataset(root, loaded, size, column, split)
    return _folder(root, size)


def _photographs(size: int | None) -> ImageSource:
    split = data.built_in_photographs(1)
    paths = [*split.train.paths, *split.held_out.paths]
    names = [*split.train.names, *split.held_out.names]
    return ImageSource(
        "built-in photographs", names, _fingerprint([(n, p.stat().st_size) for n, p in zip(names, paths, strict=True)]),
        lambda i: data.decode_image(paths[i], 1, size),
    )  # fmt: skip


def _folder(root: Path, size: int | None) -> ImageSource:
    require("PIL.Image")
    skipped: list[tuple[str, str]] = []
    paths = sorted(data.image_paths(root, skipped), key=lambda path: path.relative_to(root).as_posix())
    names = [path.relative_to(root).as_posix() for path in paths]
    if not names:
        raise TrainingError(f"{root} has no images (looked for {', '.join(sorted(data.SUFFIXES))})")
    return ImageSource(
        f"{len(names)} images in {root}", names,
        _fingerprint([(n, p.stat().st_size) for n, p in zip(names, paths, strict=True)]),
        lambda i: data.decode_image(paths[i], 1, size), tuple(skipped),
    )  # fmt: skip


def _dataset(root: Path, loaded: Any, size: int | None, column: str, split: str) -> ImageSource:
    datasets = require("datasets", "data")
    if isinstance(loaded, dict):
        if split not in loaded:
            raise TrainingError(f"{root} has no split {split!r}; it has {', '.join(map(repr, loaded))}")
        loaded = loaded[split]
    if column not in loaded.column_names:
        raise TrainingError(f"{root} has no column {column!r}; it has {', '.join(map(repr, loaded.column_names))}")
    # The files themselves, not decoded: damage is then found image by image, where it can be reported.
    raw = loaded.cast_column(column, datasets.Image(decode=False))

    def load(index: int) -> data.Pixels:
        found = raw[index][column]
        source = found["path"] if found["bytes"] is None else io.BytesIO(found["bytes"])
        return data.decode_image(source, 1, size)

    names = [f"{i:08d}" for i in range(len(raw))]
    return ImageSource(f"{len(names)} images in {root}", names, str(raw._fingerprint), load)


def _fingerprint(entries: Sequence[tuple[str, int]]) -> str:
    return hashlib.sha256("".join(f"{name}\0{size}\n" for name, size in entries).encode()).hexdigest()[:16]


def fit(pixels: data.Pixels, multiple: int, square: int | None = None) -> Tensor:
    """The middle of an image as float32 (3, H, W) in [0, 1], with sides that are multiples of ``multiple``.

    Args:
        pixels: uint8 (H, W, 3).
        multiple: what the model asks for.
        square: cut out a square of this side instead of the largest possible rectangle.

    Raises:
        ValueError: the image is too small.
    """
    height, width = pixels.shape[:2]
    sides = [square or side // multiple * multiple for side in (height, width)]
    if min(sides) < multiple or sides[0] > height or sides[1] > width:
        raise ValueError(f"it has {width} x {height} pixels; expected at least {square or multiple} on each side")
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    cut = pixels[top : top + sides[0], left : left + sides[1]]
    return torch.from_numpy(np.ascontiguousarray(cut.transpose(2, 0, 1))).float().div(255)
