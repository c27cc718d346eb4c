"""Images to train on, whatever they lie in: photographs, a folder, a data set by number, or shards as a stream.

Called by :mod:`vqkernels.training.loop`; crops of all of them are drawn by :class:`vqkernels.training.data.Crops`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vqkernels.training.config import TrainingError
from vqkernels.training.data import (
    DamagedImage,
    ImageSet,
    Pixels,
    Split,
    built_in_photographs,
    decode_image,
    hold_out,
    image_folder,
)
from vqkernels.training.image_source import ImageTable, open_table
from vqkernels.training.streamed_images import Share, stream_shards

__all__ = ["TableImages", "open_training_images"]


def open_training_images(
    data: str | None,
    *,
    image_size: int,
    resize: int | None = None,
    held_out: float = 0.1,
    column: str = "image",
    split: str = "train",
    streaming: bool = False,
    seed: int = 0,
    batch_size: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Split:
    """Training and held-out images.

    Args:
        data: a folder of image files; a folder written by ``datasets.save_to_disk`` or holding parquet, arrow or
            WebDataset tar files; ``None`` for the built-in photographs.
        image_size: crops will be this large at most; smaller images are enlarged.
        resize: see :class:`vqkernels.training.config.TrainConfig`.
        held_out: share of the images that is kept for evaluation.
        column: of a data set, with the images.
        split: of a data set.
        streaming: read shards in pieces, each image once per epoch, instead of drawing images by number.
        seed, batch_size, rank, world: of the run and this process; only a stream depends on them.

    Raises:
        TrainingError: there is no such folder, column or split, or too few images can be read.
    """
    if data is None:
        if streaming:
            raise TrainingError("the built-in photographs are no stream: name shards with --data, or don't stream")
        return built_in_photographs(image_size, resize)
    root = Path(data)
    if root.is_dir():
        if streaming:
            share = Share(batch_size, rank, world)
            train, aside, skipped = stream_shards(root, image_size, resize, held_out, column, split, seed, share)
            return Split(train, aside, tuple(skipped))
        if (table := open_table(root, column, split)) is not None:
            return _split_table(table, image_size, resize, held_out)
    return image_folder(data, image_size, resize, held_out)


class TableImages(ImageSet):
    """Some images of a data set; one that is damaged is told of when it is first drawn, and passed over.

    Args:
        table: with all images.
        rows: numbers of these.
        names, digests: of these.
        size, resize: see :func:`vqkernels.training.data.decode_image`.
    """

    def __init__(
        self, table: ImageTable, rows: Sequence[int], names: Sequence[str], digests: Sequence[str], size: int,
        resize: int | None,
    ) -> None:  # fmt: skip
        super().__init__(names, [Path(name) for name in names], digests)
        self._table, self._rows, self._size, self._resize = table, list(rows), size, resize
        self._damaged: dict[int, str] = {}

    def _read(self, index: int) -> Pixels:
        if index not in self._damaged:
            try:
                return decode_image(self._table.read(self._rows[index]), self._size, self._resize)
            except Exception as e:  # decoders raise whatever the damage makes them raise
                self._damaged[index] = f"{self.names[index]}: {' '.join(str(e).split()) or type(e).__name__}"
                warnings.warn(f"skipped {self._damaged[index]}", stacklevel=2)
        raise DamagedImage(self._damaged[index])


def _split_table(table: ImageTable, size: int, resize: int | None, held_out: float, threads: int = 4) -> Split:
    """By the hash of the name, as a folder's images are. Held-out images are decoded once here, the others when drawn.

    Unlike in a folder, copies are not looked for: that would mean to read everything.
    """
    names, digests = table.describe()
    order = sorted(range(len(names)), key=lambda i: names[i])
    if len(names) < 2:
        what = "no image" if not names else "only one image (at least two: one is held out)"
        raise TrainingError(f"{table.root} has {what}")
    chosen = hold_out(names, held_out)

    def check(row: int) -> str | None:
        try:
            decode_image(table.read(row), size, resize)
        except Exception as e:
            return " ".join(str(e).split()) or type(e).__name__
        return None

    aside = [row for row in order if names[row] in chosen]
    with ThreadPoolExecutor(threads) as pool:
        reasons = dict(zip(aside, pool.map(check, aside), strict=True))
    skipped = tuple((names[row], reason) for row, reason in reasons.items() if reason is not None)
    readable = [row for row in aside if reasons[row] is None]
    if not readable:
        first = f"{skipped[0][0]}: {skipped[0][1]}"
        raise TrainingError(f"none of the {len(aside)} held-out images of {table.root} can be read; first {first}")

    def collect(rows: Sequence[int]) -> TableImages:
        return TableImages(table, rows, [names[i] for i in rows], [digests[i] for i in rows], size, resize)

    return Split(collect([row for row in order if names[row] not in chosen]), collect(readable), skipped)
