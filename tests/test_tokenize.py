"""Images to token shards and back: the same bytes for every batch size and number of processes, and no silent loss."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands import Command, kill_at_random
from vqkernels.cli import main
from vqkernels.models import TokenStream, build_model
from vqkernels.training import TrainingError
from vqkernels.training.detokenize import detokenize
from vqkernels.training.token_shards import ImageTokens, Shard, read_shard, sha256, write_shard
from vqkernels.training.tokenize import TokenizeConfig, tokenize


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Attention included: its products round differently for every batch size."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    found = build_model("tiny-vqgan", middle_attention=True)
    with torch.no_grad():  # codes among the latents, so that tokens differ
        images = torch.rand(2, 3, 64, 64)
        found.initialize(images)  # type: ignore[attr-defined]
    found.eval().save_pretrained(folder / "model")
    return str(folder)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 images: crops of photographs in three sizes, in two folders."""
    from vqkernels.training.data import built_in_photographs

    folder = tmp_path_factory.mktemp("photographs")
    images = built_in_photographs(48).train
    (folder / "a").mkdir()
    for i in range(300):
        draw = np.random.Generator(np.random.Philox(key=[1, i]))
        pixels = images[i % 12]
        height, width = ((32, 32), (32, 48), (33, 50))[i % 3]
        top, left = int(draw.integers(pixels.shape[0] - height)), int(draw.integers(pixels.shape[1] - width))
        where = folder / "a" if i % 2 else folder
        Image.fromarray(pixels[top : top + height, left : left + width]).save(where / f"{i:03d}.png")
    return str(folder)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: sha256(p) for p in sorted(folder.iterdir())}


TAKES: list[float] = []  # seconds, of a whole run


@pytest.fixture(scope="module")
def expected(model: str, photographs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("expected") / "tokens"
    began = time.monotonic()
    manifest = tokenize(TokenizeConfig(model, photographs, str(output), shard_size=40), say=quiet)
    assert manifest is not None
    assert manifest["images_done"] == 300
    TAKES.append(time.monotonic() - began)
    return output


@pytest.mark.parametrize("batch_size", [1, 7])
def test_files_do_not_depend_on_batch_size_or_workers(
    expected: Path, model: str, photographs: str, tmp_path: Path, batch_size: int
) -> None:
    config = TokenizeConfig(
        model, photographs, str(tmp_path / "t"), shard_size=40, batch_size=batch_size, workers=batch_size
    )
    tokenize(config, say=quiet)
    assert contents(tmp_path / "t") == contents(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "batch_size"), [(2, 7), (4, 1)])
def test_files_do_not_depend_on_the_number_of_processes(
    expected: Path, model: str, photographs: str, tmp_path: Path, world: int, batch_size: int
) -> None:
    options = ["tokenize", model, "--images", photographs, "--output", str(tmp_path / "t"), "--shard-size", "40"]
    options += ["--batch-size", str(batch_size)]
    # Threads differ on purpose: tokens must not.
    started = [Command(options, {"RANK": str(r), "WORLD_SIZE": str(world)}, threads=1 + r) for r in range(world)]
    statuses, outputs, _ = zip(*(command.finish() for command in started), strict=True)
    assert statuses == (0,) * world
    assert any("300 images," in text for text in outputs)
    assert contents(tmp_path / "t") == contents(expected)


def test_the_encoder_itself_does_depend_on_the_batch(model: str) -> None:
    """Why every image is encoded alone: if this fails, tokenize may batch."""
    from vqkernels.models import VQGAN, load_model

    loaded = load_model(f"{model}/model")
    assert isinstance(loaded, VQGAN)
    torch.manual_seed(3)
    x = torch.rand(7, 3, 32, 32)
    with torch.no_grad():
        together, alone = loaded.latents(x), torch.cat([loaded.latents(image[None]) for image in x])
    assert not together.equal(alone)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_round_trip_gives_the_models_own_reconstruction(
    expected: Path, model: str, photographs: str, tmp_path: Path
) -> None:
    from vqkernels.models import load_model

    found = detokenize(str(expected), model, str(tmp_path / "r"), say=quiet)
    assert found == {"written": 300, "kept": 0, "damaged": 0}
    loaded = load_model(f"{model}/model")
    for name in ("000.png", "a/001.png"):
        pixels = np.asarray(Image.open(Path(photographs) / name))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            wanted = loaded.decode(loaded.encode(image))
        restored = np.asarray(Image.open(tmp_path / "r" / f"{name}.png")).astype(int)
        assert np.abs(restored - (wanted[0] * 255).round().permute(1, 2, 0).numpy()).max() <= 1
    odd = np.asarray(Image.open(tmp_path / "r" / "002.png.png"))
    assert odd.shape == (32, 48, 3)  # 33 x 50 pixels, cut to what the model can do
    (tmp_path / "r" / "000.png.png").unlink()
    assert detokenize(str(expected), model, str(tmp_path / "r"), say=quiet)["written"] == 1


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_files(
    expected: Path, model: str, photographs: str, tmp_path: Path
) -> None:
    options = ["tokenize", model, "--images", photographs, "--output", str(tmp_path / "t"), "--shard-size", "40"]
    draw, hits, longest = random.Random(0), 0, 0.3 * TAKES[0]
    for i in range(10):
        hit = kill_at_random(options, draw, longest, working=i % 3 < 2)
        hits += hit
        for path in (tmp_path / "t").glob("tokens-*"):  # nothing damaged under a final name
            assert sha256(path) == sha256(expected / path.name)
        if not hit:  # the timed run had a busier machine, or this one was nearly done: from the start
            longest /= 2
            shutil.rmtree(tmp_path / "t", ignore_errors=True)
    assert hits >= 3
    tokenize(TokenizeConfig(model, photographs, str(tmp_path / "t"), shard_size=40), say=quiet)
    assert contents(tmp_path / "t") == contents(expected)


def test_a_damaged_shard_is_found_and_made_again(expected: Path, model: str, photographs: str, tmp_path: Path) -> None:
    shutil.copytree(expected, tmp_path / "t")
    path = sorted((tmp_path / "t").glob("tokens-*"))[2]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said: list[str] = []
    found = detokenize(str(tmp_path / "t"), model, str(tmp_path / "r"), say=said.append)
    assert found["damaged"] == 1
    assert found["written"] == 300 - 40
    assert any(path.name in line and "damaged" in line for line in said)
    tokenize(TokenizeConfig(model, photographs, str(tmp_path / "t"), shard_size=40), say=said.append)
    assert contents(tmp_path / "t") == contents(expected)
    path.write_bytes(b"")
    assert main(["detokenize", str(tmp_path / "t"), "--model", model, "--output", str(tmp_path / "r")]) == 1


def test_truncated_images_are_skipped_with_the_reason(model: str, photographs: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("000.png", "002.png"):
        shutil.copy(Path(photographs) / name, folder)
    (folder / "001.png").write_bytes((Path(photographs) / "000.png").read_bytes()[:300])
    Image.new("RGB", (3, 500)).save(folder / "thin.png")
    (folder / "text.jpg").write_text("no image")
    (folder / "link.png").symlink_to(tmp_path / "nothing")
    manifest = tokenize(TokenizeConfig(model, str(folder), str(tmp_path / "t")), say=quiet)
    assert manifest is not None
    assert manifest["images_done"] == 2
    reasons = dict(manifest["skipped"])
    assert sorted(reasons) == ["001.png", "link.png", "text.jpg", "thin.png"]
    assert "3 x 500 pixels" in reasons["thin.png"]
    shard = read_shard(tmp_path / "t" / manifest["shards"][0]["file"])
    assert [image.name for image in shard.images] == ["000.png", "002.png"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 only")
def test_a_name_that_is_no_utf8_is_escaped(model: str, photographs: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(sorted(Path(photographs).glob("*.png"))[0], folder / os.fsdecode(b"caf\xe9.png"))
    tokenize(TokenizeConfig(model=model, images=str(folder), output=str(tmp_path / "tokens")))
    detokenize(str(tmp_path / "tokens"), model, str(tmp_path / "restored"))
    assert [path.name for path in (tmp_path / "restored").glob("*.png")] == [r"caf\xe9.png.png"]


def test_damaged_data_sets_are_one_error_and_damaged_images_in_them_are_skipped(
    model: str, photographs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = [(Path(photographs) / name).read_bytes() for name in ("000.png", "002.png", "004.png")]
    files[1] = files[1][:200]
    table = pyarrow.table({"image": [{"bytes": file, "path": None} for file in [*files, None]]})
    (tmp_path / "p").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "p" / "a.parquet")
    manifest = tokenize(TokenizeConfig(model, str(tmp_path / "p"), str(tmp_path / "t")), say=quiet)
    assert manifest is not None
    assert manifest["images_done"] == 2
    reasons = dict(manifest["skipped"])
    assert list(reasons) == ["00000001", "00000003"]
    assert "truncated" in reasons["00000001"]
    assert "row 3 has no image" in reasons["00000003"]

    whole = (tmp_path / "p" / "a.parquet").read_bytes()
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "a.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "a.tar").write_bytes(whole)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "dataset_info.json").write_text("{")
    for folder in "qws":
        with pytest.raises(TrainingError, match=rf"the data set in {tmp_path}/{folder} cannot be read: "):
            tokenize(TokenizeConfig(model, str(tmp_path / folder), str(tmp_path / "x")), say=quiet)
    assert not (tmp_path / "x").exists()


def test_parquet_holds_the_same_tokens(expected: Path, model: str, photographs: str, tmp_path: Path) -> None:
    config = TokenizeConfig(model, photographs, str(tmp_path / "t"), shard_size=40, format="parquet")
    manifest = tokenize(config, say=quiet)
    assert manifest is not None
    for a, b in zip(sorted(expected.glob("tokens-*")), sorted((tmp_path / "t").glob("tokens-*")), strict=True):
        first, second = read_shard(a), read_shard(b)
        assert [i.name for i in first.images] == [i.name for i in second.images]
        for x, y in zip(first.images, second.images, strict=True):
            assert all(s.equal(t) for s, t in zip(x.streams, y.streams, strict=True))
    path = sorted((tmp_path / "t").glob("tokens-*"))[0]
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(path).column_names == ["name", "height", "width", "tokens_0", "grid_0"]
    data = bytearray(path.read_bytes())
    data[40] ^= 255
    path.write_bytes(data)
    with pytest.raises(TrainingError, match="damaged"):
        read_shard(path)


def test_data_sets_on_disk(model: str, photographs: str, tmp_path: Path) -> None:
    import datasets

    files = sorted(Path(photographs).glob("*.png"))[:5]
    rows = datasets.Dataset.from_dict({"picture": [str(f) for f in files]}).cast_column("picture", datasets.Image())
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "tables" / "part.parquet"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in files:
        shutil.copy(file, folder)
    wanted = None
    for images in ("folder", "saved", "tables"):
        config = TokenizeConfig(model, str(tmp_path / images), str(tmp_path / f"t-{images}"), column="picture")
        manifest = tokenize(config, say=quiet)
        assert manifest is not None
        found = [i.streams[0] for i in read_shard(tmp_path / f"t-{images}" / manifest["shards"][0]["file"]).images]
        assert len(found) == 5
        wanted = wanted or found
        assert all(a.equal(b) for a, b in zip(found, wanted, strict=True)), images
        default = tokenize(TokenizeConfig(model, str(tmp_path / images), str(tmp_path / f"d-{images}")), say=quiet)
        assert default is not None  # the only column of images need not be named
        assert default["shards"] == manifest["shards"]
    with pytest.raises(TrainingError, match="no column 'photo'; it has 'picture'"):
        tokenize(TokenizeConfig(model, str(tmp_path / "saved"), str(tmp_path / "x"), column="photo"), say=quiet)


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_shards_of_any_streams_come_back(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    streams = (TokenStream(5, 8), TokenStream(70000, 4, 3), TokenStream(1, 16))
    images = tuple(
        ImageTokens(f"ä{i}.png", 8 * h, 8 * w, (
            torch.randint(5, (h, w)), torch.randint(70000, (2 * h, 2 * w, 3)), torch.zeros(h, w, dtype=torch.int64)
        ))
        for i, (h, w) in enumerate([(1, 1), (3, 2), (5, 7)])
    )  # fmt: skip
    for members in (images, ()):
        shard = Shard(4, "abc", streams, members, (("b.png", "truncated"),))
        write_shard(tmp_path / f"x.{suffix}", shard)
        first = sha256(tmp_path / f"x.{suffix}")
        found = read_shard(tmp_path / f"x.{suffix}")
        assert (found.number, found.model, found.streams, found.skipped) == (4, "abc", streams, shard.skipped)
        for a, b in zip(found.images, members, strict=True):
            assert (a.name, a.height, a.width) == (b.name, b.height, b.width)
            assert all(s.equal(t) for s, t in zip(a.streams, b.streams, strict=True))
        write_shard(tmp_path / f"x.{suffix}", shard)
        assert sha256(tmp_path / f"x.{suffix}") == first


def test_bad_input_is_one_clear_error(
    expected: Path, model: str, photographs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cases: list[tuple[list[str], str]] = [
        (["tokenize", str(tmp_path / "none")], "holds no model"),
        (["tokenize", model, "--images", str(tmp_path / "none")], "there is no folder"),
        (["tokenize", model, "--images", str(tmp_path / "empty")], "has no images"),
        (["tokenize", model, "--images", str(tmp_path / "file")], "is not a folder"),
        (["tokenize", model, "--output", str(tmp_path / "file")], "is a file"),
        (["tokenize", model, "--size", "33"], "size is 33; expected a multiple of"),
        (["tokenize", model, "--format", "csv"], "format is 'csv'"),
        (["tokenize", model, "--shard-size", "0"], "shard_size is 0"),
        (["tokenize", model, "--images", photographs, "--output", str(expected), "--shard-size", "9"], "size differ"),
        (["detokenize", str(tmp_path / "empty"), "--model", model], "has no manifest.json"),
    ]  # fmt: skip
    before = contents(expected)
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert contents(expected) == before
    other = tmp_path / "other"
    torch.manual_seed(9)
    build_model("tiny-vqgan").save_pretrained(other)
    assert main(["detokenize", str(expected), "--model", str(other), "--output", str(tmp_path / "r")]) == 2
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_shard_cannot_write_outside_of_the_output_folder(expected: Path, model: str, tmp_path: Path) -> None:
    shutil.copytree(expected, tmp_path / "t")
    path = sorted((tmp_path / "t").glob("tokens-*"))[0]
    shard = read_shard(path)
    evil = ImageTokens("../../evil", 32, 32, shard.images[0].streams)
    write_shard(path, Shard(0, shard.model, shard.streams, (evil,)))
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    manifest["shards"] = [{**manifest["shards"][0], "sha256": sha256(path), "images": 1}]
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match="outside of the output folder"):
        detokenize(str(tmp_path / "t"), model, str(tmp_path / "r" / "deep"), say=quiet)
    assert not (tmp_path / "evil.png").exists()
