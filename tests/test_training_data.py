"""Images and metrics of the training app: splits without overlap, crops by number, numbers checked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from vqkernels.models import VQVAE, TokenStream, VQVAEConfig
from vqkernels.training import TrainingError, data, metrics


def picture(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        picture(number).save(tmp_path / f"{number:02}.png")
    return tmp_path


def images(*arrays: np.ndarray) -> data.ImageSet:
    names = [str(i) for i in range(len(arrays))]
    return data.ImageSet(names, [Path(n) for n in names], names, lambda path: arrays[int(path.name)])


# Folders


def test_split_is_by_image_and_does_not_depend_on_other_images(folder: Path) -> None:
    split = data.image_folder(str(folder), 32, held_out=0.25)
    assert (len(split.train), len(split.held_out)) == (9, 3)
    assert set(split.train.names).isdisjoint(split.held_out.names)
    assert not set(split.train.digests) & set(split.held_out.digests)
    again = data.image_folder(str(folder), 32, held_out=0.25)
    assert again.held_out.names == split.held_out.names
    (folder / split.train.names[0]).unlink()
    fewer = data.image_folder(str(folder), 32, held_out=0.25)
    assert set(fewer.held_out.names) <= set(split.held_out.names)
    assert fewer.train.fingerprint() != split.train.fingerprint()


def test_damaged_images_are_skipped_with_a_reason(folder: Path) -> None:
    whole = (folder / "03.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "copy.png").write_bytes(whole)
    (folder / "readme.txt").write_text("ignored")
    (folder / ".hidden.png").write_bytes(b"ignored")
    split = data.image_folder(str(folder), 32)
    reasons = dict(split.skipped)
    assert set(reasons) == {"truncated.png", "text.jpg", "empty.webp", "copy.png"}
    assert "truncated" in reasons["truncated.png"]
    assert "cannot identify" in reasons["text.jpg"]
    assert reasons["copy.png"] == "copy of 03.png"
    assert len(split.train) + len(split.held_out) == 12


def test_folders_without_enough_images(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no")
    with pytest.raises(TrainingError, match=r"no readable image; skipped 1, first broken\.png: cannot identify"):
        data.image_folder(str(tmp_path), 32)
    picture(0).save(tmp_path / "one.png")
    with pytest.raises(TrainingError, match="only one readable image"):
        data.image_folder(str(tmp_path), 32)
    picture(1).save(tmp_path / "two.png")
    split = data.image_folder(str(tmp_path), 32, held_out=0.9)
    assert (len(split.train), len(split.held_out)) == (1, 1)


def test_kinds_of_pixels(tmp_path: Path) -> None:
    size = (34, 36)
    Image.new("L", size, 77).save(tmp_path / "grey.png")
    Image.new("RGBA", size, (200, 0, 0, 0)).save(tmp_path / "transparent.png")
    Image.fromarray(np.full(size[::-1], 0x8001, dtype=np.uint16)).save(tmp_path / "sixteen.png")
    Image.new("CMYK", size, (0, 0, 0, 255)).save(tmp_path / "print.jpg")
    rotated = Image.new("RGB", (40, 34), (1, 2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGB", (8, 16), (9, 9, 9)).save(tmp_path / "tiny.png")
    split = data.image_folder(str(tmp_path), 32, held_out=0.01)
    found = {name: s[i] for s in (split.train, split.held_out) for i, name in enumerate(s.names)}
    assert found["grey.png"].shape == (36, 34, 3)
    assert found["grey.png"][0, 0].tolist() == [77, 77, 77]
    assert found["transparent.png"][0, 0].tolist() == [255, 255, 255]
    assert found["sixteen.png"][0, 0].tolist() == [128, 128, 128]
    assert found["print.jpg"].max() < 40
    assert found["turned.png"].shape == (40, 34, 3)
    assert found["tiny.png"].shape == (64, 32, 3)
    assert data.decode_image(tmp_path / "turned.png", 32, 68).shape == (80, 68, 3)


def test_an_image_that_vanishes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    split = data.image_folder(str(folder), 32)
    split.train[0]
    split.train.paths[0].unlink()
    with pytest.raises(TrainingError, match="cannot be read any more"):
        split.train[0]


def test_built_in_photographs_are_there() -> None:
    split = data.built_in_photographs(64)
    assert (len(split.train), len(split.held_out)) == (len(data.TRAIN_PHOTOGRAPHS), len(data.HELD_OUT_PHOTOGRAPHS))
    assert set(split.train.digests).isdisjoint(split.held_out.digests)
    assert all(min(split.held_out[i].shape[:2]) >= 300 for i in range(len(split.held_out)))


def test_built_in_photographs_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"scikit-image is not installed: pip install 'vqkernels\[train\]'"):
        data.built_in_photographs(64)


# Crops


def test_crops_depend_on_seed_and_number_only() -> None:
    source = images(*(np.asarray(picture(i, (45, 61))) for i in range(3)))
    crops, again, other = (data.Crops(source, 32, seed) for seed in (7, 7, 8))
    first = [crops[i] for i in range(20)]
    assert all(torch.equal(again[i], first[i]) for i in reversed(range(20)))
    assert sum(torch.equal(other[i], first[i]) for i in range(20)) == 0
    assert len({crop.numpy().tobytes() for crop in first}) == 20


def test_crops_are_pieces_of_the_images_flipped_half_of_the_time() -> None:
    ramp = np.broadcast_to(np.arange(61, dtype=np.uint8)[None, :, None], (45, 61, 3))
    crops = data.Crops(images(ramp), 32, 0)
    steps = [int(crops[i][0, 0, 1]) - int(crops[i][0, 0, 0]) for i in range(200)]
    assert set(steps) == {1, -1}
    assert 70 < steps.count(-1) < 130
    starts = {int(crops[i][0, 0].min()) for i in range(400)}
    assert starts == set(range(61 - 32 + 1))


def test_shuffled_channels_keep_the_values_of_every_pixel() -> None:
    source = images(np.asarray(picture(0, (32, 32))))
    plain = torch.from_numpy(source[0].transpose(2, 0, 1).copy())
    crops = [data.Crops(source, 32, 0, shuffle_channels=0.5)[i] for i in range(100)]
    orders = set()
    for crop in crops:
        upright = crop if torch.equal(crop.sort(0).values, plain.sort(0).values) else crop.flip(-1)
        assert torch.equal(upright.sort(0).values, plain.sort(0).values)
        orders.add(tuple(int(next(c for c in range(3) if torch.equal(upright[i], plain[c]))) for i in range(3)))
    assert len(orders) == 6
    unchanged = sum(torch.equal(c, plain) or torch.equal(c.flip(-1), plain) for c in crops)
    assert 40 < unchanged < 75  # half, and a sixth of the other half


def test_an_image_of_exactly_the_crop_size() -> None:
    pixels = np.asarray(picture(0, (32, 32)))
    crop = data.Crops(images(pixels), 32, 0)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(crop, pixels) or np.array_equal(crop, pixels[:, ::-1])


def test_evaluation_crops_form_a_grid() -> None:
    source = images(np.asarray(picture(0, (96, 200))), np.asarray(picture(1, (32, 32))))
    crops, names = data.evaluation_crops(source, 32, 8)
    assert names.count("0") == 8
    assert names.count("1") == 1
    assert torch.equal(crops[0], torch.from_numpy(source[0][:32, :32].transpose(2, 0, 1).copy()))
    assert torch.equal(crops[7], torch.from_numpy(source[0][-32:, -32:].transpose(2, 0, 1).copy()))
    many = images(*[np.asarray(picture(0, (40, 40)))] * 30)
    assert len(set(data.evaluation_crops(many, 32, 4, most=20)[1])) == 5


def test_sample_crops_show_different_places() -> None:
    source = images(*(np.asarray(picture(i, (100 + i, 150))) for i in range(3)))
    crops, names = data.sample_crops(source, 32, 8, 8)
    assert crops.shape == (8, 3, 96, 96)
    assert names == ["0", "1", "2", "0", "1", "2", "0", "1"]
    assert len({crop.numpy().tobytes() for crop in crops}) == 8


# Metrics


def test_code_statistics_by_hand() -> None:
    assert metrics.code_statistics(torch.tensor([[2, 2, 0, 0]])) == (0.5, pytest.approx(2.0))
    assert metrics.code_statistics(torch.tensor([[1, 1, 1, 1], [4, 0, 0, 0]])) == (0.625, pytest.approx(2.5))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics.code_statistics(torch.tensor([[3, 0, 1]]))[1] == pytest.approx(math.exp(entropy))


def test_heads_are_counted_apart() -> None:
    streams = [TokenStream(3, 4, 2)]
    indices = torch.tensor([[[[0, 2], [0, 1]]]])  # (B, h, w, heads)
    assert metrics.count_codes(indices, streams)[0].tolist() == [[2, 0, 0], [0, 1, 1]]


def test_evaluation_against_other_formulas() -> None:
    model = VQVAE(VQVAEConfig(base_channels=8, residual_channels=8, codes=11, dim=4, quantizer={"init": "kmeans"}))
    crops = torch.from_numpy(np.stack([np.asarray(picture(i, (32, 32))).transpose(2, 0, 1) for i in range(5)]))
    model(metrics.to_unit(crops, torch.device("cpu")))
    found = metrics.evaluate(model, crops, ["a", "a", "b", "b", "b"], torch.device("cpu"), batch_size=2)
    assert model.training
    with torch.no_grad():
        originals = crops.double() / 255
        out = model.eval()(originals.float())
        restored = out.reconstruction.clamp(0, 1).double()
    errors = (restored - originals).square().mean((1, 2, 3))
    psnr = -10 * errors.log10()
    assert found["psnr"] == pytest.approx(psnr.mean().item(), abs=1e-4)
    assert found["psnr_pooled"] == pytest.approx(-10 * math.log10(errors.mean().item()), abs=1e-4)
    assert found["mse"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert found["psnr_by_image"]["a"] == pytest.approx(psnr[:2].mean().item(), abs=1e-4)
    similarity = [
        structural_similarity(
            o.numpy(), r.numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for o, r in zip(originals, restored, strict=True)
    ]  # fmt: skip
    assert found["ssim"] == pytest.approx(np.mean(similarity), abs=5e-3)
    counts = torch.bincount(out.quantizer.indices.flatten(), minlength=11)
    share = counts / counts.sum()
    assert found["usage"] == pytest.approx((counts > 0).double().mean().item())
    assert found["perplexity"] == pytest.approx(
        math.exp(-(share * share.clamp(min=1e-30).log()).sum().item()), rel=1e-5
    )


def test_window_means_and_restart() -> None:
    window = metrics.Window([TokenStream(4, 4)], torch.device("cpu"))
    for reconstruction, code in ((0.1, 0), (0.3, 2)):
        terms = {name: torch.tensor(1.0) for name in metrics.TERMS} | {"reconstruction": torch.tensor(reconstruction)}
        window.add(terms, [torch.nn.functional.one_hot(torch.tensor([code]), 4)])
    restored = metrics.Window([TokenStream(4, 4)], torch.device("cpu"))
    restored.restore(window.tensors())
    for each in (window, restored):
        line = each.take()
        assert line["reconstruction"] == pytest.approx(0.2)
        assert line["psnr"] == pytest.approx(-10 * math.log10(0.2))
        assert (line["usage"], line["perplexity"]) == (0.5, pytest.approx(2.0))
        assert each.take()["usage"] == 0
