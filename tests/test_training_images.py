"""Images to train on from data sets: a folder's crops in any format, damage passed over, streams by number."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import tarfile
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vqkernels.training import TrainingError, data, image_shards, streamed_images
from vqkernels.training.training_images import open_training_images

COUNT, SIDE = 23, 32


def png(number: int, size: tuple[int, int] = (40, 36)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels[:, :, 0] = number  # so that a crop tells where it is from
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def files(count: int = COUNT, start: int = 0) -> dict[str, bytes]:
    return {f"{i:04}.png": png(i) for i in range(start, start + count)}


def rows(content: dict[str, bytes]) -> pa.Table:
    return pa.table({"image": [{"bytes": c, "path": name} for name, c in content.items()]})


def write_tar(path: Path, content: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, c in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(c)
            tar.addfile(member, io.BytesIO(c))


def write(root: Path, kind: str, content: dict[str, bytes], name: str = "a", group: int = 5) -> str:
    root.mkdir(exist_ok=True)
    if kind == "folder":
        for file, c in content.items():
            (root / file).write_bytes(c)
    elif kind == "parquet":
        pq.write_table(rows(content), root / f"{name}.parquet", row_group_size=group)
    elif kind == "arrow":
        with pa.OSFile(str(root / f"{name}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, rows(content).schema) as w:
            w.write_table(rows(content), max_chunksize=group)
    elif kind == "tar":
        write_tar(root / f"{name}.tar", content)
    else:
        table = datasets.Dataset(rows(content)).cast_column("image", datasets.Image())
        table.save_to_disk(str(root))
    return str(root)


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image_shards, "TAR_PIECE", 5)


def opened(root: str, **options: Any) -> data.Split:
    return open_training_images(root, **{"image_size": SIDE, "held_out": 0.2} | options)


def numbers(crops: data.Crops, count: int, start: int = 0) -> list[int]:
    """Which image each crop is from."""
    return [int(crops[i].reshape(3, -1)[0, 0]) for i in range(start, start + count)]


# By number


@pytest.mark.parametrize("streaming", [False, True])
def test_the_only_column_of_images_need_not_be_named(tmp_path: Path, streaming: bool) -> None:
    root = tmp_path / "p"
    root.mkdir()
    pq.write_table(
        rows(files()).rename_columns(["img"]).append_column("label", [list(range(COUNT))]), root / "a.parquet"
    )
    assert len(set(numbers(data.Crops(opened(str(root), streaming=streaming).train, SIDE, 0), 60))) > 10
    with pytest.raises(TrainingError, match=r"has no column 'label2'; it has 'img', 'label'"):
        opened(str(root), column="label2", streaming=streaming)


@pytest.mark.parametrize("kind", ["saved", "parquet", "arrow", "tar"])
def test_crops_are_those_of_the_same_images_in_a_folder(tmp_path: Path, kind: str) -> None:
    content = files()
    expected = opened(write(tmp_path / "folder", "folder", content))
    found = opened(write(tmp_path / kind, kind, dict(reversed(content.items()))))
    for a, b in ((expected.train, found.train), (expected.held_out, found.held_out)):
        assert a.names == b.names
        crops, others = data.Crops(a, SIDE, 3), data.Crops(b, SIDE, 3)
        assert all(torch.equal(crops[i], others[i]) for i in range(30))
    grids = [data.evaluation_crops(s.held_out, SIDE, 2) for s in (expected, found)]
    assert torch.equal(grids[0][0], grids[1][0])
    assert found.skipped == ()


def test_what_names_a_data_set_is_its_names_and_sizes(tmp_path: Path) -> None:
    content = files()
    train = opened(write(tmp_path / "a", "parquet", content)).train
    first = train.fingerprint()
    assert opened(write(tmp_path / "b", "arrow", content)).train.fingerprint() == first
    longer = content | {train.names[3]: png(3, (60, 60))}
    assert opened(write(tmp_path / "c", "parquet", longer)).train.fingerprint() != first
    assert opened(write(tmp_path / "d", "parquet", files(COUNT - 1))).train.fingerprint() != first


def test_a_damaged_image_is_passed_over_and_told_of_once(tmp_path: Path) -> None:
    content = files()
    split = opened(write(tmp_path / "whole", "folder", content))
    out, kept = split.train.names[4], split.held_out.names[0]
    content[out], content[kept] = content[out][:200], b"nothing"
    found = opened(write(tmp_path / "tar", "tar", content))
    assert [name for name, _ in found.skipped] == [kept]
    assert "cannot identify" in found.skipped[0][1]
    assert kept not in found.held_out.names
    crops = data.Crops(found.train, SIDE, 0)
    with pytest.warns(UserWarning, match=rf"skipped {out}: .*truncated") as told:
        drawn = numbers(crops, 200)
    assert len(told) == 1
    assert set(drawn) == {int(name[:4]) for name in found.train.names} - {int(out[:4])}
    assert numbers(crops, 200) == drawn


def test_nothing_but_damaged_images_is_an_error(tmp_path: Path) -> None:
    split = opened(write(tmp_path / "whole", "folder", files()))
    content = {name: png(0) if name in split.held_out.names else b"nothing" for name in files()}
    found = opened(write(tmp_path / "bad", "parquet", content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TrainingError, match="100 images drawn in a row are damaged"):
            data.Crops(found.train, SIDE, 0)[0]
    for name in split.held_out.names:
        content[name] = b"nothing"
    with pytest.raises(TrainingError, match=r"none of the 5 held-out images .* can be read"):
        opened(write(tmp_path / "worse", "parquet", content))


def test_columns_and_splits_that_are_not_there(tmp_path: Path) -> None:
    root = write(tmp_path / "p", "parquet", files())
    for streaming in (False, True):
        with pytest.raises(TrainingError, match=r"has no column 'picture'; it has 'image'"):
            opened(root, column="picture", streaming=streaming)
    named = tmp_path / "named"
    write(named, "parquet", files(), "train-00000-of-00001")
    write(named, "parquet", files(3, 90), "test-00000-of-00001")
    both = datasets.DatasetDict({"train": datasets.Dataset(rows(files()))})
    both.save_to_disk(str(tmp_path / "both"))
    for streaming in (False, True):
        assert max(numbers(data.Crops(opened(str(named), streaming=streaming).train, SIDE, 0), 60)) < COUNT
        with pytest.raises(TrainingError, match=r"has no split 'val'; its shards are of 'test', 'train'"):
            opened(str(named), split="val", streaming=streaming)
        with pytest.raises(TrainingError, match=r"has no split 'val'; it has 'train'"):
            opened(str(tmp_path / "both"), split="val", streaming=streaming)
        assert len(opened(str(tmp_path / "both"), streaming=streaming).train) > 10


@pytest.mark.parametrize("streaming", [False, True])
def test_data_without_enough_images(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match=r"has no shards to stream" if streaming else r"has no readable image"):
        opened(str(tmp_path / "empty"), streaming=streaming)
    with pytest.raises(TrainingError, match="there is no folder"):
        opened(str(tmp_path / "none"), streaming=streaming)
    with pytest.raises(TrainingError, match="have no images" if streaming else "cannot be read"):
        opened(write(tmp_path / "none_inside", "parquet", {}), streaming=streaming)
    with pytest.raises(TrainingError, match="only one image"):
        opened(write(tmp_path / "one", "parquet", files(1)), streaming=streaming)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.parquet").write_bytes(b"no footer")
    with pytest.raises(TrainingError, match=r"cannot be read|damaged shards"):
        opened(str(tmp_path / "bad"), streaming=streaming)


def test_the_photographs_are_no_stream() -> None:
    with pytest.raises(TrainingError, match="no stream"):
        open_training_images(None, image_size=SIDE, streaming=True)
    assert len(open_training_images(None, image_size=SIDE).train) == len(data.TRAIN_PHOTOGRAPHS)


# Streams


def shards(root: Path, kind: str, count: int = 60) -> str:
    for i in range(3):
        write(root, kind, files(count // 3, i * count // 3), f"s{i}")
    return str(root)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_a_stream_shows_every_training_image_once_per_epoch(tmp_path: Path, kind: str) -> None:
    found = opened(shards(tmp_path / kind, kind), streaming=True, seed=1)
    crops, size = data.Crops(found.train, SIDE, 1), len(found.train)
    first, second = numbers(crops, size), numbers(crops, size, size)
    assert sorted(first) == sorted(second)
    assert len(set(first)) == size
    assert first not in (second, sorted(first))
    out = {int(name[:4]) for name in found.held_out.names}
    assert out | set(first) == set(range(60))
    assert not out & set(first)
    other = opened(str(tmp_path / kind), streaming=True, seed=2)
    assert other.held_out.names == found.held_out.names
    assert numbers(data.Crops(other.train, SIDE, 2), size) != first


def test_a_stream_is_a_function_of_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_images, "WINDOW", 12)
    root = shards(tmp_path / "t", "tar")
    whole = data.Crops(opened(root, streaming=True).train, SIDE, 0)
    expected = [whole[i] for i in range(130)]
    for start in (129, 61, 13, 0):  # as after a resumption there
        resumed = data.Crops(opened(root, streaming=True).train, SIDE, 0)
        assert all(torch.equal(resumed[i], expected[i]) for i in range(start, min(start + 9, 130)))
    batches = [list(range(i, i + 5)) for i in range(0, 60, 5)]
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(whole, batch_sampler=batches, num_workers=workers)
        assert torch.equal(torch.cat(list(loader)), torch.stack(expected[:60]))
    assert torch.equal(pickle.loads(pickle.dumps(whole))[77], expected[77])  # what a spawned worker gets


def test_processes_share_a_stream(tmp_path: Path) -> None:
    root = shards(tmp_path / "p", "parquet")
    batch, world, steps = 6, 2, 3
    seen = []
    for rank in range(world):
        found = opened(root, streaming=True, batch_size=batch, rank=rank, world=world)
        crops = data.Crops(found.train, SIDE, 0)
        first = [s * batch + rank * batch // world for s in range(steps)]
        seen.append([n for f in first for n in numbers(crops, batch // world, f)])
    assert len(set(seen[0])) == len(set(seen[1])) == steps * batch // world
    assert not set(seen[0]) & set(seen[1])
    with pytest.raises(TrainingError, match=r"the data have 12 row groups.* for 13 processes"):
        opened(root, streaming=True, batch_size=13, rank=0, world=13)


def test_a_stream_keeps_one_window_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_images, "WINDOW", 8)
    monkeypatch.setattr(streamed_images, "HELD_OUT_KEPT", 4)
    monkeypatch.setattr(streamed_images, "HELD_OUT_PIECES", 4)
    peaks = []
    for count in (40, 240):
        root = tmp_path / str(count)
        root.mkdir()
        write_tar(root / "a.tar", {f"{i}.png": png(i % 256, (100, 100)) for i in range(count)})  # 30 kB each
        tracemalloc.start()
        crops = data.Crops(opened(str(root), streaming=True).train, SIDE, 0)
        for i in range(count):
            crops[i]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < 240 * 20_000 / 2


def test_damage_in_a_stream_is_passed_over(tmp_path: Path) -> None:
    root = Path(shards(tmp_path / "t", "tar"))
    whole = opened(str(root), streaming=True)
    out = numbers(data.Crops(whole.train, SIDE, 0), 1)[0]
    shard, name = root / f"s{out // 20}.tar", f"{out:04}.png"
    with tarfile.open(shard) as tar:
        start = tar.getmember(name).offset_data
    with shard.open("r+b") as file:
        file.seek(start)
        file.write(bytes(100))
    found = opened(str(root), streaming=True)
    crops, size = data.Crops(found.train, SIDE, 0), len(found.train)
    assert size == len(whole.train)
    with pytest.warns(UserWarning, match=rf"skipped {name}: cannot identify") as told:
        drawn = numbers(crops, size)
    assert len(told) == 1
    assert Counter(drawn)[drawn[0]] == 2  # the next one stands in for it
    assert set(drawn) == set(numbers(data.Crops(whole.train, SIDE, 0), size)) - {out}


def test_a_shard_that_ends_early_gives_what_it_has(tmp_path: Path) -> None:
    root = Path(shards(tmp_path / "t", "tar"))
    shard = root / "s1.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    whole = shard.read_bytes()
    shard.write_bytes(whole[: members[12].offset_data + 100])
    (root / "s2.tar").write_bytes(whole[: members[7].offset] + b"damaged header" * 40 + whole[members[8].offset :])
    found = opened(str(root), streaming=True)
    assert [name for name, _ in found.skipped[:2]] == ["s1.tar", "s2.tar"]
    assert "damaged at byte" in found.skipped[1][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = set(numbers(data.Crops(found.train, SIDE, 0), 2 * len(found.train)))
    assert {20, 31} <= drawn | {int(name[:4]) for name in found.held_out.names}
    assert 32 not in drawn  # half of it is there
    (root / "s0.tar").unlink()
    pq.write_table(rows(files()), root / "p.parquet", row_group_size=5)
    content = bytearray((root / "p.parquet").read_bytes())
    content[4:60] = bytes(56)  # the head of the first page
    (root / "p.parquet").write_bytes(content)
    damaged = opened(str(root), streaming=True)
    with pytest.warns(UserWarning, match=r"skipped images 0 to 4 of .*p\.parquet"):
        drawn = set(numbers(data.Crops(damaged.train, SIDE, 0), 2 * len(damaged.train)))
    assert drawn >= set(range(5, COUNT)) - {int(name[:4]) for name in damaged.held_out.names}


def test_members_of_a_tar_by_suffix(tmp_path: Path) -> None:
    root = tmp_path / "t"
    root.mkdir()
    content: dict[str, bytes] = {}
    for i in range(12):
        content |= {f"{i}.png": png(i), f"{i}.mask.png": png(100 + i), f"{i}.txt": b"what it shows", f"._{i}.png": b"x"}
    write_tar(root / "a.tar", content)
    for column, count in (("png", 12), ("mask.png", 12), ("image", 24)):
        found = opened(str(root), streaming=True, column=column)
        drawn = set(numbers(data.Crops(found.train, SIDE, 0), len(found.train)))
        assert len(found.train) + len(found.held_out) == count
        assert min(drawn) >= (100 if column == "mask.png" else 0)
    with pytest.raises(TrainingError, match="have no images"):
        opened(str(root), streaming=True, column="jpg")


# A side per step


def test_sides_are_drawn_by_step_and_shared_by_a_batch() -> None:
    sides = data.StepSides((32, 48, 64), seed=5, batch_size=4)
    drawn = [sides(i) for i in range(400)]
    assert all(len(set(drawn[i : i + 4])) == 1 for i in range(0, 400, 4))
    assert set(Counter(drawn[::4])) == {32, 48, 64}
    assert min(Counter(drawn[::4]).values()) > 20
    assert [data.StepSides((32, 48, 64), 6, 4)(i) for i in range(400)] != drawn
    crops = data.Crops(open_training_images(None, image_size=64).train, sides, 5)
    loader = torch.utils.data.DataLoader(crops, batch_sampler=[list(range(i, i + 4)) for i in range(0, 40, 4)])
    assert [batch.shape[-1] for batch in loader] == drawn[:40:4]


def test_the_split_of_a_folder_has_not_moved() -> None:
    names = [f"{i:04}.png" for i in range(10)]
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert data.hold_out(names, 0.3) == set(order[:3])
    assert len(data.hold_out(names, 0.99)) == 9
    assert len(data.hold_out(names[:2], 0.01)) == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 only")
def test_a_name_that_is_no_utf8_is_escaped(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / os.fsdecode(b"\xe9%d.png" % number)).write_bytes(png(number))
    split = data.image_folder(str(tmp_path), 32)
    assert sorted([*split.train.names, *split.held_out.names]) == [r"\xe90.png", r"\xe91.png"]
