"""Files of tokens: what a shard holds, how it is written in one step, and how damage is found when it is read.

Called by :mod:`vqkernels.training.tokenize` and :mod:`vqkernels.training.detokenize`. The same tokens give the same
bytes: nothing in a file depends on time, machine, batch or process.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels._files import replace_file
from vqkernels.models import TokenStream, pack_tokens, unpack_tokens
from vqkernels.training.config import TrainingError, require

__all__ = ["FORMATS", "ImageTokens", "Shard", "read_shard", "sha256", "write_shard"]

FORMATS = ("safetensors", "parquet")
VERSION = "vqkernels-tokens-1"


@dataclass(frozen=True)
class ImageTokens:
    """Tokens of one image: one int64 tensor (h, w) or (h, w, per_place) per stream of the model."""

    name: str
    height: int
    width: int
    streams: tuple[Tensor, ...]


@dataclass(frozen=True)
class Shard:
    """Consecutive images of a data set.

    Attributes:
        number: of the shard.
        model: SHA-256 of the model that made the tokens.
        streams: of that model: K, downsampling, tokens per place.
        images: in the order of the data set.
        skipped: (name, reason) of the images that could not be read.
    """

    number: int
    model: str
    streams: tuple[TokenStream, ...]
    images: tuple[ImageTokens, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens of all images and streams."""
        return sum(t.numel() for image in self.images for t in image.streams)


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_shard(path: Path, shard: Shard) -> None:
    """Write a shard in one step; the suffix of ``path`` chooses the format.

    ``.safetensors``: per stream ``tokens.<i>``, the packed tokens of all images (:func:`vqkernels.models.pack_tokens`,
    each image from a whole byte on) and ``grids.<i>`` (images, 2 or 3), the shapes; ``sizes`` (images, 2), pixels; one
    JSON text in the metadata. ``.parquet``: a row per image with ``name``, ``height``, ``width``, ``tokens_<i>`` and
    ``grid_<i>``.

    Raises:
        OSError: the folder cannot be written.
    """
    facts = {
        "version": VERSION,
        "number": shard.number,
        "model": shard.model,
        "streams": [asdict(s) for s in shard.streams],
        "skipped": [list(pair) for pair in shard.skipped],
    }
    if path.suffix == ".parquet":
        replace_file(path, _parquet(shard, facts))
        return
    tensors: dict[str, Tensor] = {
        "sizes": torch.tensor([[i.height, i.width] for i in shard.images], dtype=torch.int32).view(-1, 2)
    }
    for s, stream in enumerate(shard.streams):
        packed = b"".join(pack_tokens(image.streams[s], stream.codes) for image in shard.images)
        # .copy(): a buffer of bytes is not writable, which torch warns of.
        tensors[f"tokens.{s}"] = torch.from_numpy(np.frombuffer(packed, dtype=np.uint8).copy())
        shapes = [list(image.streams[s].shape) for image in shard.images]
        dims = 3 if stream.per_place > 1 else 2
        tensors[f"grids.{s}"] = torch.tensor(shapes, dtype=torch.int32).view(-1, dims)
    facts["names"] = [image.name for image in shard.images]
    facts["sha256"] = _digest(tensors, facts)
    # One entry of metadata: safetensors writes several in no fixed order.
    text = json.dumps(facts, sort_keys=True)
    replace_file(path, require("safetensors.torch").save(tensors, metadata={"vqkernels": text}))


def read_shard(path: Path) -> Shard:
    """Read a shard and check it against its digest.

    Raises:
        TrainingError: it is missing, damaged, or no shard.
    """
    try:
        if path.suffix == ".parquet":
            return _from_parquet(path)
        return _from_safetensors(path)
    except FileNotFoundError as e:
        raise TrainingError(f"{path} is missing") from e
    except TrainingError:
        raise
    except Exception as e:  # each format raises types of its own for damage
        if isinstance(e, OSError) and e.errno is not None:  # of the disk; pyarrow's for damage have no number
            raise
        raise TrainingError(f"{path} is damaged: {' '.join(str(e).split()) or type(e).__name__}") from e


def _from_safetensors(path: Path) -> Shard:
    with require("safetensors").safe_open(str(path), "pt") as file:
        facts = json.loads((file.metadata() or {}).get("vqkernels", "null"))
        if not isinstance(facts, dict) or facts.get("version") != VERSION:
            raise TrainingError(f"{path} holds no tokens of vqkernels")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = facts.pop("sha256", None)
    if expected != _digest(tensors, facts):
        raise TrainingError(f"{path} is damaged: its content does not match its SHA-256")
    streams = tuple(TokenStream(**s) for s in facts["streams"])
    names, sizes = facts["names"], tensors["sizes"].tolist()
    per_stream = []
    for s, stream in enumerate(streams):
        data, position, found = tensors[f"tokens.{s}"].numpy().tobytes(), 0, []
        for shape in tensors[f"grids.{s}"].tolist():
            size = (int(np.prod(shape)) * stream.bits + 7) // 8
            found.append(unpack_tokens(data[position : position + size], stream.codes, shape))
            position += size
        per_stream.append(found)
    images = tuple(
        ImageTokens(name, height, width, tuple(found[i] for found in per_stream))
        for i, (name, (height, width)) in enumerate(zip(names, sizes, strict=True))
    )
    skipped = tuple((name, reason) for name, reason in facts["skipped"])
    return Shard(facts["number"], facts["model"], streams, images, skipped)


def _digest(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parquet(shard: Shard, facts: dict[str, Any]) -> bytes:
    pyarrow, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    columns: dict[str, Any] = {
        "name": pyarrow.array([i.name for i in shard.images], pyarrow.string()),
        "height": pyarrow.array([i.height for i in shard.images], pyarrow.int32()),
        "width": pyarrow.array([i.width for i in shard.images], pyarrow.int32()),
    }
    for s, stream in enumerate(shard.streams):
        kind = pyarrow.uint16() if stream.codes <= 2**16 else pyarrow.uint32()
        tokens = [i.streams[s].reshape(-1).tolist() for i in shard.images]
        columns[f"tokens_{s}"] = pyarrow.array(tokens, pyarrow.list_(kind))
        grids = [list(i.streams[s].shape) for i in shard.images]
        columns[f"grid_{s}"] = pyarrow.array(grids, pyarrow.list_(pyarrow.int32()))
    table = pyarrow.table(columns)
    facts["sha256"] = _table_digest(table, facts)
    table = table.replace_schema_metadata({"vqkernels": json.dumps(facts, sort_keys=True)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _from_parquet(path: Path) -> Shard:
    table = require("pyarrow.parquet", "data").read_table(path, partitioning=None)
    facts = json.loads((table.schema.metadata or {}).get(b"vqkernels", b"null"))
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise TrainingError(f"{path} holds no tokens of vqkernels")
    expected = facts.pop("sha256", None)
    if expected != _table_digest(table, facts):
        raise TrainingError(f"{path} is damaged: its content does not match its SHA-256")
    streams = tuple(TokenStream(**s) for s in facts["streams"])

    def tokens(row: dict[str, Any], s: int) -> Tensor:
        return torch.tensor(row[f"tokens_{s}"], dtype=torch.int64).view(row[f"grid_{s}"])

    images = tuple(
        ImageTokens(row["name"], row["height"], row["width"], tuple(tokens(row, s) for s in range(len(streams))))
        for row in table.to_pylist()
    )
    return Shard(facts["number"], facts["model"], streams, images, tuple((n, r) for n, r in facts["skipped"]))


def _table_digest(table: Any, facts: dict[str, Any]) -> str:
    text = json.dumps([facts, table.to_pydict()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
