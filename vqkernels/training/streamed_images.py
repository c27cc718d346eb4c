"""Images of data sets too large to index: shards read in pieces, in a shuffled order that follows from numbers alone.

Called by :mod:`vqkernels.training.training_images`. ``datasets``' own streams lose their shuffle buffer when they are
resumed; here the image of a crop follows from (seed, process, number), so that any step can be returned to.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vqkernels.training.config import TrainingError
from vqkernels.training.data import DamagedImage, ImageSet, Pixels, decode_image
from vqkernels.training.image_shards import TAR_PIECE, Entry, Piece, list_pieces, read_piece
from vqkernels.training.image_source import BUILDERS, find_shards

__all__ = ["EncodedImages", "Share", "StreamedImages", "stream_shards"]

# Images that are shuffled together, and held-out images that are kept.
WINDOW, HELD_OUT_KEPT, HELD_OUT_PIECES = 1024, 128, 16


class EncodedImages(ImageSet):
    """Images kept as the content of their files, decoded on demand.

    Args:
        entries: names and contents, all readable.
        size, resize: see :func:`vqkernels.training.data.decode_image`.
    """

    def __init__(self, entries: Sequence[Entry], size: int, resize: int | None) -> None:
        names = [name for name, _ in entries]
        super().__init__(names, [Path(name) for name in names], [_digest(entry) for entry in entries])
        self._entries, self._size, self._resize = list(entries), size, resize

    def _read(self, index: int) -> Pixels:
        return _decode(self._entries[index], self._size, self._resize)


@dataclass(frozen=True)
class Share:
    """Which crops a process makes: those of its part of every step's batch."""

    batch_size: int = 1
    rank: int = 0
    world: int = 1

    def place(self, number: int) -> int:
        """How many crops the process makes before crop ``number``."""
        step, i = divmod(number, self.batch_size)
        part = self.batch_size // self.world
        return step * part + i - self.rank * part


class StreamedImages(ImageSet):
    """The training images of shards, each once per epoch; processes see different ones.

    An epoch is a random order of all pieces; process ``rank`` takes every ``world``-th. Consecutive pieces with
    :data:`WINDOW` images or more are a window, whose images are shuffled; one window is in memory.

    Args:
        pieces: of all shards.
        aside: whether an image is held out, by piece.
        column: with the images.
        size, resize: see :func:`vqkernels.training.data.decode_image`.
        seed: of the run.
        share: of this process.

    Raises:
        TrainingError: there are fewer pieces than processes.
    """

    def __init__(
        self, pieces: Sequence[Piece], aside: Sequence[NDArray[np.bool_]], column: str, size: int, resize: int | None,
        seed: int, share: Share,
    ) -> None:  # fmt: skip
        super().__init__([], [], [])
        kept = [(piece, ~out) for piece, out in zip(pieces, aside, strict=True) if not out.all()]
        self.pieces, self._kept = [piece for piece, _ in kept], [mask for _, mask in kept]
        self._counts = [int(mask.sum()) for mask in self._kept]
        self._column, self._size, self._resize, self._seed, self._share = column, size, resize, seed, share
        if len(self.pieces) < share.world:
            raise TrainingError(
                f"the data have {len(self.pieces)} row groups, record batches or runs of {TAR_PIECE} images for "
                f"{share.world} processes; write smaller ones, or don't stream"
            )
        self._starts = [0]  # of the epochs, in images of this process
        self._orders: dict[int, tuple[NDArray[np.int64], list[int]]] = {}
        self._window: tuple[int, int, list[Entry]] | None = None
        self._told: set[str] = set()

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> Pixels:
        raise TypeError("streamed images have no numbers; use draw")

    def fingerprint(self) -> str:
        """Changes when a shard is added, removed, renamed or has another size."""
        digest = hashlib.sha256()
        for shard in dict.fromkeys(piece.shard for piece in self.pieces):
            digest.update(f"{shard.name}\0{shard.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]

    def draw(self, number: int, random: np.random.Generator) -> Pixels:
        """The image of crop ``number``; a damaged one is replaced by the next of its window.

        Raises:
            TrainingError: no image of the window can be read.
        """
        window, slot = self._find(self._share.place(number))
        for turn in range(len(window)):
            entry = window[(slot + turn) % len(window)]
            try:
                return _decode(entry, self._size, self._resize)
            except DamagedImage as e:
                if entry[0] not in self._told:
                    self._told.add(entry[0])
                    warnings.warn(f"skipped {e}", stacklevel=2)
        raise TrainingError(f"none of {len(window)} images that follow one another can be read, for one {window[0][0]}")

    def _find(self, place: int) -> tuple[list[Entry], int]:
        """The window of a place in the stream, and the number within it."""
        if self._window is None or not self._window[0] <= place < self._window[1]:
            while place >= self._starts[-1]:
                self._starts.append(self._starts[-1] + self._order(len(self._starts) - 1)[1][-1])
            epoch = bisect_right(self._starts, place) - 1
            order, ends = self._order(epoch)
            start = self._starts[epoch]
            first, begin = 0, 0
            while True:  # from one window to the next
                last = min(bisect_left(ends, begin + WINDOW), len(ends) - 1)
                if place - start < ends[last]:
                    break
                first, begin = last + 1, ends[last]
            self._window = None  # the old one must go before the new one comes
            entries = self._fetch(epoch, first, [int(i) for i in order[first : last + 1]])
            self._window = start + begin, start + ends[last], entries
        return self._window[2], place - self._window[0]

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        """The pieces of this process in an epoch, and the number of images up to the end of each."""
        if epoch not in self._orders:
            if len(self._orders) > 2:
                self._orders.clear()
            mixed = self._random(epoch).permutation(len(self.pieces))[self._share.rank :: self._share.world]
            self._orders[epoch] = mixed, list(accumulate(self._counts[i] for i in mixed))
        return self._orders[epoch]

    def _fetch(self, epoch: int, first: int, chosen: Sequence[int]) -> list[Entry]:
        entries: list[Entry] = []
        for i in chosen:
            piece, keep = self.pieces[i], self._kept[i]
            try:
                found = read_piece(piece, self._column)
            except Exception as e:  # readers raise whatever the damage makes them raise
                where = f"images {piece.first} to {piece.first + piece.count - 1} of {piece.shard}"
                if where not in self._told:
                    self._told.add(where)
                    warnings.warn(f"skipped {where}: {_reason(e)}", stacklevel=2)
                found = [(where, None)] * piece.count
            entries += [entry for entry, kept in zip(found, keep, strict=True) if kept]
        mixed = self._random(epoch, self._share.rank, first).permutation(len(entries))
        return [entries[i] for i in mixed]

    def _random(self, epoch: int, rank: int = -1, first: int = 0) -> np.random.Generator:
        # Counters of its own: crops draw from the same keys.
        return np.random.Generator(np.random.Philox(key=[self._seed, epoch], counter=[0, first, rank + 1, 2]))


def stream_shards(
    root: Path, size: int, resize: int | None, held_out: float, column: str, split: str, seed: int, share: Share
) -> tuple[StreamedImages, EncodedImages, list[tuple[str, str]]]:
    """Training images, held-out images and what was left out: (name, reason).

    Which images are held out follows from the names of the shards and the numbers within them. Of the held-out images
    the first ones of pieces all over the data are kept in memory, :data:`HELD_OUT_KEPT` at most.

    Raises:
        TrainingError: there are no shards, no images in them, or no such column.
    """
    if (root / "dataset_dict.json").exists():  # datasets.save_to_disk with several splits: a folder each
        splits = sorted(path.parent.name for path in root.glob("*/dataset_info.json"))
        if split not in splits:
            raise TrainingError(f"{root} has no split {split!r}; it has {', '.join(map(repr, splits))}")
        root /= split
    _, shards = find_shards(root, split)
    if not shards:
        raise TrainingError(
            f"{root} has no shards to stream (looked for {', '.join(f'*.{kind}' for kind in BUILDERS)})"
        )
    skipped: list[tuple[str, str]] = []
    pieces: list[Piece] = []
    aside: list[NDArray[np.bool_]] = []
    for shard in shards:
        key = int.from_bytes(hashlib.sha256(shard.name.encode()).digest()[:16], "little")
        chance = np.random.Generator(np.random.Philox(key=key))
        try:
            for piece in list_pieces(shard, column):
                pieces.append(piece)
                aside.append(chance.random(piece.count) < held_out)
        except TrainingError:
            raise
        except Exception as e:  # readers raise whatever the damage makes them raise
            skipped.append((shard.name, _reason(e)))
    if not pieces:
        why = f"; first of {len(skipped)} damaged shards: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise TrainingError(f"the shards in {root} have no images{why}")
    if sum(len(out) for out in aside) < 2:
        raise TrainingError(f"{root} has only one image (at least two: one is held out)")
    flat = np.concatenate(aside)
    if not flat.any() or flat.all():  # a few images: at least one on each side
        aside[-1][-1] = not flat.all()
    kept = _keep(pieces, aside, column, size, resize, skipped)
    return StreamedImages(pieces, aside, column, size, resize, seed, share), kept, skipped


def _keep(
    pieces: Sequence[Piece], aside: Sequence[NDArray[np.bool_]], column: str, size: int, resize: int | None,
    skipped: list[tuple[str, str]],
) -> EncodedImages:  # fmt: skip
    with_some = [i for i, out in enumerate(aside) if out.any()]
    few = min(HELD_OUT_PIECES, len(with_some))
    found: list[Entry] = []
    for i in (with_some[round(j * (len(with_some) - 1) / max(few - 1, 1))] for j in range(few)):
        piece = pieces[i]
        try:
            entries = read_piece(piece, column)
        except Exception as e:
            skipped.append((piece.shard.name, _reason(e)))
            continue
        taken = 0
        for entry, out in zip(entries, aside[i], strict=True):
            if not out or taken == -(-HELD_OUT_KEPT // few):
                continue
            try:
                _decode(entry, size, resize)
            except DamagedImage as e:
                skipped.append((entry[0], str(e).partition(": ")[2]))
                continue
            found.append(entry)
            taken += 1
    if not found:
        why = f"; skipped {len(skipped)}, first {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise TrainingError(f"none of the held-out images can be read{why}")
    return EncodedImages(found, size, resize)


def _decode(entry: Entry, size: int, resize: int | None) -> Pixels:
    name, content = entry
    if content is None:
        raise DamagedImage(f"{name}: there is no image")
    try:
        return decode_image(io.BytesIO(content) if isinstance(content, bytes) else Path(content), size, resize)
    except Exception as e:  # decoders raise whatever the damage makes them raise
        raise DamagedImage(f"{name}: {_reason(e)}") from e


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _digest(entry: Entry) -> str:
    content = entry[1]
    return hashlib.sha256(content if isinstance(content, bytes) else str(content).encode()).hexdigest()
