"""Evaluation of saved models: numbers against their definitions, one page that opens offline, resumable."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from PIL import Image

from tests.commands import kill_at_random
from vqkernels.cli import main
from vqkernels.models import build_model, load_model
from vqkernels.training import TrainingError, figures, quality, stability
from vqkernels.training.evaluate import EvaluateConfig, evaluate
from vqkernels.training.image_source import fit, open_source


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two run folders that differ in the seed, with curves as `vqkernels train` writes them."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        model = build_model("tiny", codes=64)
        model(torch.rand(2, 3, 64, 64))  # k-means on the first batch
        model.eval().save_pretrained(folder / "model")
        lines = [{"step": i, "loss": 1 / i, "usage": 0.5 + 0.01 * i, "perplexity": 20.0 + i} for i in range(1, 21)]
        held_out = [{"step": 20, "psnr": 20.0 + seed}]
        (folder / "metrics.json").write_text(json.dumps({"history": {"train": lines, "held_out": held_out}}))
        (folder / "config.json").write_text(json.dumps({"codes": 64, "seed": seed, "output": str(folder)}))
        found.append(str(folder))
    return found


TAKES: list[float] = []  # seconds, of a whole run


@pytest.fixture(scope="module")
def report(folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("report")
    began = time.monotonic()
    found = evaluate(EvaluateConfig(tuple(folders), output=str(output), size=64, limit=9), say=quiet)
    TAKES.append(time.monotonic() - began)
    return found, output


def test_numbers_are_what_they_say(report: tuple[dict[str, Any], Path], folders: list[str]) -> None:
    found = report[0]["models"][0]
    model = load_model(f"{folders[0]}/model")
    source = open_source(None, size=64)
    numbers = [round(i * 15 / 8) for i in range(9)]
    counts, errors = torch.zeros(64, dtype=torch.int64), []
    for number, image in zip(numbers, found["images"], strict=True):
        x = fit(source.load(number), 4, 64)[None]
        (tokens,) = model.encode_to_indices(x)
        counts += torch.bincount(tokens.flatten(), minlength=64)
        mse = (model.decode_indices((tokens,)).clamp(0, 1) - x).double().square().mean().item()
        errors.append(mse)
        assert image["name"] == source.names[number]
        assert image["mse"] == pytest.approx(mse, rel=1e-4)
        assert image["psnr"] == pytest.approx(-10 * math.log10(mse), abs=1e-3)
    assert found["quality"]["mse"]["mean"] == pytest.approx(np.mean(errors), rel=1e-4)
    detail = [image["sharpness"] for image in found["images"] if "sharpness" in image]
    assert found["quality"]["sharpness"]["mean"] == pytest.approx(np.mean(detail))
    (stream,) = found["streams"]
    assert sum(stream["counts"][0]) == 9 * 256
    assert np.abs(np.array(stream["counts"][0]) - counts.numpy()).sum() <= 4  # threads differ, so may near ties
    assert stream["usage"] == np.count_nonzero(stream["counts"][0]) / 64
    p = np.array(stream["counts"][0]) / sum(stream["counts"][0])
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert stream["entropy_bits"] == pytest.approx(entropy)
    assert stream["perplexity"] == pytest.approx(2**entropy)
    assert found["bits_per_pixel"] == pytest.approx(6 / 16)
    assert stream["bits_per_pixel_entropy_coded"] == pytest.approx(entropy / 16)
    assert set(found["missing"]) == {"lpips", "rfid", "ms_ssim"}


def test_the_page_opens_offline_and_compares_side_by_side(report: tuple[dict[str, Any], Path]) -> None:
    page = (report[1] / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert not re.findall(r"https?://|url\(|@import|<script|<link|<iframe", page)
    assert page.count('alt="original"') >= 6
    assert page.count('alt="error"') == 2 * page.count('alt="original"')
    assert page.count('alt="map of the codebook"') == 2
    assert 'alt="curves"' in page
    for found in report[0]["models"]:
        assert f"{found['quality']['psnr']['mean']:.2f}" in page
    assert "rFID is not shown" in page
    sharp = [found["quality"]["sharpness"]["mean"] for found in report[0]["models"]]
    best = min(sharp, key=lambda value: abs(math.log(value)))  # near to 1, not large
    assert f'<td class="best">{best:.3f}</td>' in page.partition("<td>sharpness</td>")[2].partition("</tr>")[0]


def test_spread_over_seeds(report: tuple[dict[str, Any], Path]) -> None:
    (group,) = report[0]["seeds"]
    psnr = [m["quality"]["psnr"]["mean"] for m in report[0]["models"]]
    assert group["seeds"] == [0, 1]
    assert group["psnr"]["mean"] == pytest.approx(np.mean(psnr))
    assert group["psnr"]["std"] == pytest.approx(np.std(psnr, ddof=1))


@torch.no_grad()
def test_diversity_rate_and_speed_are_in_the_report(report: tuple[dict[str, Any], Path], folders: list[str]) -> None:
    page = (report[1] / "report.html").read_text()
    source = open_source(None, size=64)
    for folder, found in zip(folders, report[0]["models"], strict=True):
        model = load_model(f"{folder}/model")
        originals, restored, tokens = [], [], []
        for name in (image["name"] for image in found["images"]):
            x = fit(source.load(list(source.names).index(name)), 4, 64)[None]
            (indices,) = model.encode_to_indices(x)
            originals.append(x.unflatten(2, (16, 4)).unflatten(4, (16, 4)).mean((3, 5)).flatten().double().numpy())
            y = model.decode_indices((indices,)).clamp(0, 1)
            restored.append(y.unflatten(2, (16, 4)).unflatten(4, (16, 4)).mean((3, 5)).flatten().double().numpy())
            tokens.append(set(indices.flatten().tolist()))
        pairs = [(i, j) for i in range(9) for j in range(i)]
        for name, small in (("originals", originals), ("reconstructions", restored)):
            wanted = np.mean([np.linalg.norm(small[i] - small[j]) for i, j in pairs]) / (3 * 16 * 16) ** 0.5
            assert found["diversity"][f"pixels_of_{name}"] == pytest.approx(wanted, rel=1e-3)
        jaccard = np.mean([1 - len(tokens[i] & tokens[j]) / len(tokens[i] | tokens[j]) for i, j in pairs])
        assert found["diversity"]["tokens"] == pytest.approx(jaccard, abs=0.02)
        assert found["timing"]["encode_images_per_second"] > 0
        assert f"{found['timing']['decode_images_per_second']:.1f}" in page
        assert f"{found['diversity']['tokens']:.3f}" in page
        assert f"{found['bits_per_pixel']:.4f}" in page
    for heading in ("diversity kept", "token diversity", "bits per pixel, entropy coded", "encode, images/s"):
        assert f"<td>{heading}" in page
    assert "Over the seeds 0, 1: PSNR" in page  # stability


def without_timing(path: Path) -> Any:
    report = json.loads(path.read_text())
    for model in report["models"]:
        del model["timing"]
    return report


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_report(
    report: tuple[dict[str, Any], Path], folders: list[str], tmp_path: Path
) -> None:
    options = ["evaluate", *folders, "--output", str(tmp_path / "r"), "--size", "64", "--limit", "9"]
    draw, hits, longest = random.Random(1), 0, 0.1 * TAKES[0]
    for i in range(10):
        hit = kill_at_random(options, draw, longest, working=i % 3 < 2)
        hits += hit
        for path in (tmp_path / "r").rglob("*.json"):
            if not path.name.startswith("."):
                json.loads(path.read_text())
        if not hit:  # the timed run had a busier machine, or this one was nearly done: from the start
            longest /= 2
            shutil.rmtree(tmp_path / "r", ignore_errors=True)
    assert hits >= 3
    evaluate(EvaluateConfig(tuple(folders), output=str(tmp_path / "r"), size=64, limit=9), say=quiet)
    assert without_timing(tmp_path / "r" / "report.json") == without_timing(report[1] / "report.json")


def test_a_second_call_measures_only_what_is_new(folders: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"output": str(tmp_path / "r"), "size": 32, "limit": 2}
    evaluate(EvaluateConfig((folders[0],), **options), say=said.append)
    first = json.loads((tmp_path / "r" / "report.json").read_text())["models"][0]
    evaluate(EvaluateConfig(tuple(folders), **options), say=said.append)
    assert sum("measured already" in line for line in said) == 1
    assert json.loads((tmp_path / "r" / "report.json").read_text())["models"][0]["timing"] == first["timing"]
    evaluate(EvaluateConfig((folders[0],), **options | {"size": 64}), say=said.append)
    assert sum("measured already" in line for line in said) == 1


def test_unreadable_images_are_listed(folders: list[str], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i, size in enumerate([(64, 48), (200, 180), (33, 70)]):
        pixels = np.random.Generator(np.random.Philox(i)).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:100])
    found = evaluate(EvaluateConfig((folders[0],), str(images), str(tmp_path / "r")), say=quiet)["models"][0]
    assert [image["name"] for image in found["images"]] == ["0.png", "1.png", "2.png"]
    assert [name for name, _ in found["skipped"]] == ["broken.png"]
    assert found["quality"]["ms_ssim"]["count"] == 1  # the only one that is large enough
    (images / "0.png").write_bytes(b"")
    for name in ("1.png", "2.png"):
        (images / name).unlink()
    with pytest.raises(TrainingError, match="none of the 2 images could be measured"):
        evaluate(EvaluateConfig((folders[0],), str(images), str(tmp_path / "s")), say=quiet)


def test_bad_input_is_one_clear_error(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"model": "VQVAE"}')
    (damaged / "model.safetensors").write_bytes(b"nothing")
    for arguments, message in (
        ([str(tmp_path / "none")], "holds no model"),
        ([str(damaged)], "is damaged"),
        ([folders[0], "--images", str(tmp_path / "none")], "there is no folder"),
        ([folders[0], "--images", str(tmp_path / "empty")], "has no images"),
        ([folders[0], "--output", str(tmp_path / "file")], "is a file"),
        ([folders[0], "--size", "30"], "size is 30; expected a multiple of 4"),
        ([folders[0], "--limit", "0"], "limit is 0"),
    ):
        assert main(["evaluate", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
    assert not os.path.exists("report")


def test_frechet_distance_equals_the_textbook_formula() -> None:
    torch.manual_seed(0)
    a, b = (
        torch.randn(300, 6, dtype=torch.float64),
        torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6).double(),
    )
    sa, sb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(sa @ sb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(sa + sb - 2 * root)
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="at least two"):
        quality.frechet_distance(a[:1], b)


def blurred(image: np.ndarray, sigma: float) -> torch.Tensor:
    return torch.from_numpy(np.stack([scipy.ndimage.gaussian_filter(c, sigma, mode="nearest") for c in image]))


def test_sharpness_falls_with_blur_and_equals_the_formula() -> None:
    source = open_source(None)
    for number in (0, 2, 7, 13):
        image = source.load(number).transpose(2, 0, 1)[:, 50:210, 40:240] / 255.0
        original = torch.from_numpy(image)
        values = [quality.sharpness(original, blurred(image, sigma)) for sigma in (0.3, 0.6, 1.0, 2.0, 4.0)]
        assert all(v is not None for v in values)
        assert values == sorted(values, reverse=True)  # type: ignore[type-var]
        assert values[0] is not None
        assert values[-1] is not None
        assert values[0] < 1
        assert values[-1] < 0.02
        assert quality.sharpness(original, original) == 1
        mask = original + 0.5 * (original - blurred(image, 1.0))  # unsharp masking
        assert (quality.sharpness(original, mask) or 0) > 1.2
        # OpenCV's and scipy's Laplacian, of the grey image
        grey = [np.tensordot([0.299, 0.587, 0.114], x, 1) for x in (image, blurred(image, 1.0).numpy())]
        variance = [scipy.ndimage.laplace(x)[1:-1, 1:-1].var() for x in grey]
        assert values[2] == pytest.approx(variance[1] / variance[0], rel=1e-10)


def test_sharpness_of_an_image_without_detail_is_left_out() -> None:
    ramp = torch.linspace(0, 1, 50).expand(3, 50, 50)
    assert quality.sharpness(ramp, ramp) is None
    assert quality.sharpness(torch.rand(3, 2, 9), torch.rand(3, 2, 9)) is None
    found = quality.ImageMetrics(torch.device("cpu"))(ramp, ramp)
    assert "sharpness" not in found
    assert found["psnr"] == 100


def test_curve_statistics_see_a_divergence() -> None:
    steady = [{"loss": 10 * 0.9**i, "usage": 0.5} for i in range(40)]
    spoilt = [*steady[:20], {"loss": 60.0, "usage": 0.1}, *steady[21:]]
    a, b = stability.curve_statistics(steady), stability.curve_statistics(spoilt)
    assert a is not None
    assert b is not None
    assert a["largest_rise"] == 1.0
    assert b["largest_rise"] > 20
    assert stability.curve_statistics(steady[:3]) is None


def test_projection_keeps_distances_of_a_plane_and_its_signs() -> None:
    torch.manual_seed(2)
    plane, axes = torch.randn(50, 2).double() * torch.tensor([3.0, 1.0]), torch.linalg.qr(torch.randn(7, 2).double())[0]
    points, share = figures.project(plane @ axes.T)
    assert share == pytest.approx(1.0)
    torch.testing.assert_close(torch.pdist(points), torch.pdist(plane))
    assert figures.project(plane @ axes.T)[0].equal(points)


def test_error_map_is_black_where_nothing_differs() -> None:
    x = torch.rand(3, 8, 8)
    other = x.clone()
    other[:, 2, 3] = (x[:, 2, 3] + 0.5).clamp(0, 1)
    found = figures.error_map(x, other)
    assert found.dtype == torch.uint8
    assert int(found[:, 0, 0].sum()) < 10
    assert int(found[:, 2, 3].sum()) > 100
