"""Shards of encoded images (parquet, arrow, WebDataset tar) read piece by piece, with nothing in memory but a piece.

Called by :mod:`vqkernels.training.streamed_images`. Opening reads footers and tar headers only, never an image.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from vqkernels.training.config import TrainingError, require
from vqkernels.training.data import SUFFIXES

__all__ = ["TAR_PIECE", "Entry", "Piece", "list_pieces", "read_piece"]

TAR_PIECE = 256
FILE = {"bytes", "path"}  # how `datasets` stores an image

# Name, and the content of an image file or the path to one; None: the row has no image.
Entry = tuple[str, "bytes | str | None"]


@dataclass(frozen=True)
class Piece:
    """A row group, a record batch, or a run of images in a tar.

    Attributes:
        shard: the file.
        place: number of the row group or record batch, or byte offset in the tar.
        first: number of its first image within the shard.
        count: of its images.
    """

    shard: Path
    place: int
    first: int
    count: int


def list_pieces(shard: Path, column: str) -> Iterator[Piece]:
    """Pieces of a shard, in order.

    Args:
        shard: the file; its suffix says what it is.
        column: with the images, ``"image"`` also for the only one of that kind; in a tar the suffix of the members, or
            ``"image"`` for every kind of image.

    Raises:
        TrainingError: there is no such column.
        Exception: whatever the damage of a shard makes its reader raise, after the pieces before it.
    """
    first = 0
    if shard.suffix == ".tar":
        place = count = 0
        damage: Exception | None = None
        with shard.open("rb") as file:
            try:
                for member, after in _members(file, 0):
                    count += _is_image(member, column)
                    if count == TAR_PIECE:
                        yield Piece(shard, place, first, count)
                        place, first, count = after, first + count, 0
            except Exception as e:
                damage = e
        if count:
            yield Piece(shard, place, first, count)
        if damage is not None:
            raise damage
        return
    for place, count in enumerate(_table_counts(shard, column)):
        if count:
            yield Piece(shard, place, first, count)
        first += count


def read_piece(piece: Piece, column: str) -> list[Entry]:
    """The images of a piece as they are in the file, not decoded.

    Raises:
        Exception: whatever the damage of the shard makes its reader raise.
    """
    if piece.shard.suffix == ".tar":
        return _read_tar(piece, column)
    table = _open_table(piece.shard)
    column = _find_column(piece.shard, table, column)
    if piece.shard.suffix == ".parquet":
        rows = table.read_row_group(piece.place, columns=[column]).column(column).to_pylist()
    else:
        rows = _batch(table, piece.place).column(column).to_pylist()
    numbered = [f"{piece.shard.stem}/{piece.first + i:08d}" for i in range(len(rows))]
    return [_entry(name, row) for name, row in zip(numbered, rows, strict=True)]


def _entry(name: str, row: Any) -> Entry:
    if isinstance(row, dict):  # datasets.Image: the file itself, or where it is
        path, content = row.get("path"), row.get("bytes")
        return path or name, path if content is None else content
    return name, row


# Tables


def _open_table(shard: Path) -> Any:
    if shard.suffix == ".parquet":
        return require("pyarrow.parquet", "data").ParquetFile(shard)
    pyarrow = require("pyarrow", "data")
    mapped = pyarrow.memory_map(str(shard))
    try:
        return pyarrow.ipc.open_stream(mapped)  # what `datasets` writes
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(mapped)


def _table_counts(shard: Path, column: str) -> Iterator[int]:
    table = _open_table(shard)
    _find_column(shard, table, column)
    if shard.suffix == ".parquet":
        for i in range(table.metadata.num_row_groups):
            yield int(table.metadata.row_group(i).num_rows)
    elif hasattr(table, "num_record_batches"):
        for i in range(table.num_record_batches):
            yield int(table.get_batch(i).num_rows)
    else:
        for batch in table:
            yield int(batch.num_rows)


def _find_column(shard: Path, table: Any, column: str) -> str:
    schema = table.schema_arrow if shard.suffix == ".parquet" else table.schema
    if column in schema.names:
        return column
    types = require("pyarrow", "data").types
    pictures = [
        field.name for field in schema
        if types.is_struct(field.type) and {field.type.field(i).name for i in range(field.type.num_fields)} == FILE
    ]  # fmt: skip
    if column != "image" or len(pictures) != 1:
        raise TrainingError(f"{shard} has no column {column!r}; it has {', '.join(map(repr, schema.names))}")
    return str(pictures[0])


def _batch(table: Any, place: int) -> Any:
    if hasattr(table, "num_record_batches"):
        return table.get_batch(place)
    for _ in range(place):  # a stream has no index; of a mapped file this reads the heads of the batches only
        table.read_next_batch()
    return table.read_next_batch()


# Tars


def _members(file: BinaryIO, offset: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Members from an offset on, each with the offset of the one after it."""
    file.seek(offset)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it remembers all of them
            yield member, tar.offset
        # tarfile takes a damaged header for the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")


def _is_image(member: tarfile.TarInfo, column: str) -> bool:
    name = PurePosixPath(member.name).name
    if not member.isfile() or name.startswith("."):
        return False
    if column == "image":
        return PurePosixPath(name).suffix.lower() in SUFFIXES
    return name.partition(".")[2] == column


def _read_tar(piece: Piece, column: str) -> list[Entry]:
    found: list[Entry] = []
    with piece.shard.open("rb") as file:
        for member, after in _members(file, piece.place):
            if _is_image(member, column):
                file.seek(member.offset_data)
                found.append((member.name, file.read(member.size)))
                if len(found) == piece.count:
                    break
                file.seek(after)
    return found
