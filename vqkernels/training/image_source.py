"""Images one by one, by number: a folder, the built-in photographs, or a Hugging Face data set on disk.

Called by :mod:`vqkernels.training.tokenize` and :mod:`vqkernels.training.evaluate`. The order depends on names only,
so that every process and every later call sees the same images under the same numbers.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels.training import data
from vqkernels.training.config import TrainingError, require

__all__ = ["BUILDERS", "ImageSource", "ImageTable", "find_shards", "fit", "open_source", "open_table"]

# Suffix of shards to the builder of `datasets` that reads them.
BUILDERS = {"parquet": "parquet", "arrow": "arrow", "tar": "webdataset"}
# Shards called like train-00000-of-00010.parquet belong to a split.
SPLITS = frozenset({"train", "test", "validation", "valid", "val", "dev"})


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
    if (table := open_table(root, column, split)) is not None:
        return ImageSource(
            f"{len(table)} images in {root}", [f"{i:08d}" for i in range(len(table))], table.version,
            lambda i: data.decode_image(table.read(i), 1, size),
        )  # fmt: skip
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
    names = [data.name_below(root, path) for path in paths]
    if not names:
        raise TrainingError(f"{root} has no images (looked for {', '.join(sorted(data.SUFFIXES))})")
    return ImageSource(
        f"{len(names)} images in {root}", names,
        _fingerprint([(n, _size(p)) for n, p in zip(names, paths, strict=True)]),
        lambda i: data.decode_image(paths[i], 1, size), tuple(skipped),
    )  # fmt: skip


def _size(path: Path) -> int:
    """In bytes; -1 for a broken link, which is skipped where it is to be decoded."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


class ImageTable:
    """A column of images in a Hugging Face data set on disk: read by number, not decoded.

    Args:
        root: for messages.
        rows: a ``datasets.Dataset``.
        column: with the images.

    Attributes:
        version: changes when the data set does, or is elsewhere.
    """

    def __init__(self, root: Path, rows: Any, column: str) -> None:
        # The files themselves, not decoded: damage is then found image by image, where it can be reported.
        self._rows = rows.cast_column(column, require("datasets", "data").Image(decode=False))
        self.root, self._column, self.version = root, column, str(self._rows._fingerprint)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Path | io.BytesIO:
        """The file of image ``index``.

        Raises:
            ValueError: the row has none.
        """
        found = self._rows[index][self._column]
        if found is None or (found["bytes"] is None and found["path"] is None):
            raise ValueError(f"row {index} has no image")
        return Path(found["path"]) if found["bytes"] is None else io.BytesIO(found["bytes"])

    def describe(self) -> tuple[list[str], list[str]]:
        """Names and sizes in bytes of all images, without reading them; names are numbers where files have none."""
        compute = require("pyarrow.compute", "data")
        rows = self._rows if self._rows._indices is None else self._rows.flatten_indices()
        files = rows.data.column(self._column)
        paths = compute.struct_field(files, "path").to_pylist()
        sizes = compute.binary_length(compute.struct_field(files, "bytes")).to_pylist()
        unnamed = None in paths or len(set(paths)) < len(paths)
        names = [f"{i:08d}" for i in range(len(paths))] if unnamed else paths
        return names, [f"{path if size is None else size}" for path, size in zip(paths, sizes, strict=True)]


def find_shards(root: Path, split: str) -> tuple[str, list[Path]]:
    """The shards in a folder and their kind; where names begin with those of splits, only the split's.

    Raises:
        TrainingError: there are shards of other splits only.
    """
    for kind in BUILDERS:
        if files := sorted(root.glob(f"*.{kind}")):
            by_split = [(re.split(r"[-_.0-9]", path.name)[0], path) for path in files]
            if not any(name in SPLITS or name == split for name, _ in by_split):
                return kind, files
            if chosen := [path for name, path in by_split if name == split]:
                return kind, chosen
            names = ", ".join(map(repr, sorted({name for name, _ in by_split})))
            raise TrainingError(f"{root} has no split {split!r}; its shards are of {names}")
    return "", []


def open_table(root: Path, column: str = "image", split: str = "train") -> ImageTable | None:
    """The data set in a folder, or ``None`` if there is none.

    Args:
        root: written by ``datasets.save_to_disk``, or holding parquet, arrow or WebDataset tar files.
        column: with the images; if there is none called ``"image"``, the only one of that kind.
        split: of a data set that has several.

    Raises:
        TrainingError: it cannot be read, or has no such split or column.
    """
    saved = (root / "dataset_info.json").exists() or (root / "dataset_dict.json").exists()
    kind, shards = find_shards(root, split)
    if not saved and not shards:
        return None
    datasets = require("datasets", "data")
    try:
        if saved:
            loaded = datasets.load_from_disk(str(root))
        else:
            loaded = datasets.load_dataset(BUILDERS[kind], data_files={split: [str(path) for path in shards]})
    except Exception as e:  # builders raise whatever the damage makes them raise
        cause: BaseException = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise TrainingError(f"the data set in {root} cannot be read: {' '.join(str(cause).split())}") from e
    if isinstance(loaded, dict):
        if split not in loaded:
            raise TrainingError(f"{root} has no split {split!r}; it has {', '.join(map(repr, loaded))}")
        loaded = loaded[split]
    if column not in loaded.column_names:
        pictures = [
            name for name, kind in loaded.features.items()
            if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and kind.keys() == {"bytes", "path"})
        ]  # fmt: skip
        if column != "image" or len(pictures) != 1:
            raise TrainingError(f"{root} has no column {column!r}; it has {', '.join(map(repr, loaded.column_names))}")
        column = pictures[0]
    return ImageTable(root, loaded, column)


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
