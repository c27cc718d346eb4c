"""Images: the built-in photographs or a folder, checked once, split by image, cut into reproducible crops.

Called by :mod:`vqkernels.training.loop`; a crop depends on (seed, its number) only, so resuming and any number of
processes see the same crops.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.training.config import TrainingError, require

__all__ = [
    "Crops",
    "DamagedImage",
    "ImageSet",
    "Split",
    "StepSides",
    "built_in_photographs",
    "decode_image",
    "evaluation_crops",
    "file_digest",
    "hold_out",
    "image_folder",
    "image_paths",
    "sample_crops",
]

Pixels = NDArray[np.uint8]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
# Decoded images are kept in memory up to here; beyond it they are decoded again when a crop needs them.
CACHE_BYTES = 1 << 30

# Photographs inside the wheels of scikit-image and scikit-learn. The held-out ones share no scene with the others.
TRAIN_PHOTOGRAPHS = (
    "skimage/astronaut.png", "skimage/brick.png", "skimage/coffee.png", "skimage/coins.png", "sklearn/flower.jpg",
    "skimage/grass.png", "skimage/gravel.png", "skimage/hubble_deep_field.jpg", "skimage/ihc.png", "skimage/moon.png",
    "skimage/motorcycle_left.png", "skimage/retina.jpg",
)  # fmt: skip
HELD_OUT_PHOTOGRAPHS = ("skimage/camera.png", "skimage/chelsea.png", "sklearn/china.jpg", "skimage/rocket.jpg")
PHOTOGRAPH_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
# So many damaged images drawn one after the other mean that the data are damaged, not an image.
DAMAGED_IN_A_ROW = 100


class DamagedImage(TrainingError):
    """One image of many that cannot be read: another one is drawn in its place."""


class ImageSet:
    """Named images of different sizes, decoded on demand to uint8 (H, W, 3).

    Args:
        names: what to call them in reports.
        paths: where they are.
        digests: of the files, for :meth:`fingerprint`.
        load: path to pixels; not needed where a subclass reads something else than paths.
    """

    def __init__(
        self,
        names: Sequence[str],
        paths: Sequence[Path],
        digests: Sequence[str],
        load: Callable[[Path], Pixels] | None = None,
    ) -> None:
        self.names, self.paths, self.digests = list(names), list(paths), list(digests)
        self._load = load
        self._cache: dict[int, Pixels] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.names)

    def _read(self, index: int) -> Pixels:
        assert self._load is not None
        try:
            return self._load(self.paths[index])
        except Exception as e:  # it was readable when the run began
            raise TrainingError(f"{self.paths[index]} cannot be read any more: {e}") from e

    def __getitem__(self, index: int) -> Pixels:
        if (pixels := self._cache.get(index)) is None:
            pixels = self._read(index)
            if self._cached_bytes + pixels.nbytes <= CACHE_BYTES:
                self._cache[index] = pixels
                self._cached_bytes += pixels.nbytes
        return pixels

    def draw(self, number: int, random: np.random.Generator) -> Pixels:
        """The image of a crop, each equally often; damaged ones are passed over.

        Args:
            number: of the crop; sets that go through their images in an order of their own follow it.
            random: of the crop.

        Raises:
            TrainingError: an image that was readable when the run began no longer is, or too many are damaged.
        """
        for _ in range(DAMAGED_IN_A_ROW):
            try:
                return self[int(random.integers(len(self)))]
            except DamagedImage as e:
                last = e
        raise TrainingError(f"{DAMAGED_IN_A_ROW} images drawn in a row are damaged; the last one: {last}") from last

    def fingerprint(self) -> str:
        """Changes when an image is added, removed, renamed or edited."""
        digest = hashlib.sha256()
        for name, content in zip(self.names, self.digests, strict=True):
            digest.update(f"{name}\0{content}\n".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """Training and held-out images, no image in both, and what was left out: (name, reason)."""

    train: ImageSet
    held_out: ImageSet
    skipped: tuple[tuple[str, str], ...] = ()


def decode_image(path: Path | BinaryIO, size: int, resize: int | None) -> Pixels:
    """RGB pixels of the first frame; the shorter side is ``resize``, or at least ``size``."""
    image_module, ops = require("PIL.Image"), require("PIL.ImageOps")
    with image_module.open(path) as opened:
        image = ops.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip instead of scale
            image = image_module.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = image_module.alpha_composite(image_module.new("RGBA", rgba.size, "white"), rgba)
        image = image.convert("RGB")
    shorter = min(image.size)
    target = resize if resize is not None else max(shorter, size)
    if target != shorter:
        width, height = (max(target, round(side * target / shorter)) for side in image.size)
        image = image.resize((width, height), image_module.Resampling.LANCZOS)
    return np.asarray(image)


def _loader(size: int, resize: int | None) -> Callable[[Path], Pixels]:
    return partial(decode_image, size=size, resize=resize)  # a lambda could not go to a worker that was spawned


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def built_in_photographs(size: int, resize: int | None = None) -> Split:
    """Twelve photographs to train on and four others to evaluate, from installed packages; nothing is downloaded.

    Args:
        size: crops will be this large.
        resize: see :class:`TrainConfig`.

    Raises:
        TrainingError: scikit-image or scikit-learn is not installed, or its pictures are missing.
    """

    def collect(names: Sequence[str]) -> ImageSet:
        paths = [_photograph(name) for name in names]
        stems = [path.stem for path in paths]
        return ImageSet(stems, paths, [file_digest(path) for path in paths], _loader(size, resize))

    require("PIL.Image")
    return Split(collect(TRAIN_PHOTOGRAPHS), collect(HELD_OUT_PHOTOGRAPHS))


def _photograph(name: str) -> Path:
    package, _, file = name.partition("/")
    # find_spec does not import: importing scikit-learn takes longer than reading its pictures.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise TrainingError(f"{distribution} is not installed: pip install 'vqkernels[train]', or use --data FOLDER")
    path = Path(spec.origin).parent / PHOTOGRAPH_FOLDERS[package] / file
    if not path.is_file():
        raise TrainingError(f"this installation of {package} lacks {file}: install it from its wheel, or use --data")
    return path


def image_folder(folder: str, size: int, resize: int | None = None, held_out: float = 0.1, threads: int = 4) -> Split:
    """Every readable image below ``folder``, split by image.

    Each file is decoded once here, so damage shows before training starts. Copies of a file count once, so that no
    picture is on both sides. Which images are held out follows from their names alone: it is the same for every seed.

    Args:
        folder: searched recursively; files with other suffixes are ignored.
        size: crops will be this large; smaller images are enlarged.
        resize: see :class:`TrainConfig`.
        held_out: share of images to hold out, at least one.
        threads: to check files with.

    Raises:
        TrainingError: there is no such folder, or it has fewer than two readable images.
    """
    require("PIL.Image")
    root = Path(folder)
    if not root.exists():
        raise TrainingError(f"there is no folder {folder}")
    if not root.is_dir():
        raise TrainingError(f"{folder} is not a folder")
    skipped: list[tuple[str, str]] = []
    paths = sorted(image_paths(root, skipped), key=lambda path: path.relative_to(root).as_posix())
    load = _loader(size, resize)

    def check(path: Path) -> tuple[str | None, str]:
        try:
            load(path)
            return file_digest(path), ""
        except Exception as e:  # decoders raise whatever the damage makes them raise
            return None, str(e) or type(e).__name__

    kept: dict[str, tuple[str, Path]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for path, (digest, reason) in zip(paths, pool.map(check, paths), strict=True):
            name = name_below(root, path)
            if digest is None:
                skipped.append((name, " ".join(reason.split())))
            elif digest in kept:
                skipped.append((name, f"copy of {kept[digest][0]}"))
            else:
                kept[digest] = (name, path)
    if len(kept) < 2:
        what = "no readable image" if not kept else "only one readable image (at least two: one is held out)"
        unreadable = f"; skipped {len(skipped)}, first {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise TrainingError(f"{folder} has {what}{unreadable}")

    aside = hold_out([name for name, _ in kept.values()], held_out)

    def collect(out: bool) -> ImageSet:
        chosen = [(name, path, digest) for digest, (name, path) in kept.items() if (name in aside) == out]
        names, files, digests = zip(*chosen, strict=True)
        return ImageSet(names, files, digests, load)

    return Split(collect(False), collect(True), tuple(skipped))


def name_below(root: Path, path: Path) -> str:
    """An image's name: its path in ``root`` with slashes; bytes that are no UTF-8, which no file of ours could hold,
    are escaped, as ``\\xe9``. A name that looks like that already has its backslash escaped: no two are the same."""
    plain = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", path.relative_to(root).as_posix())
    return plain.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def hold_out(names: Sequence[str], share: float) -> set[str]:
    """Which of at least two images to hold out: at least one, not all, chosen by the hash of the name alone."""
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(order[: min(max(1, round(len(names) * share)), len(names) - 1)])


def image_paths(root: Path, skipped: list[tuple[str, str]]) -> Iterator[Path]:
    """Files below ``root`` with the suffix of an image; folders that cannot be read go to ``skipped``.

    Raises:
        TrainingError: ``root`` itself cannot be read.
    """

    def report(error: OSError) -> None:
        if error.filename == str(root):
            raise TrainingError(f"{root} cannot be read: {error.strerror}") from error
        skipped.append((name_below(root, Path(error.filename)), str(error.strerror)))

    for folder, folders, files in os.walk(root, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(folder, name)


class StepSides:
    """A side for every step, drawn from a few: multi-scale training. All crops of a step have the same side.

    Args:
        sides: to draw from, each equally often.
        seed: of the run.
        batch_size: crops per step, over all processes together.

    Example:
        >>> side = StepSides((32, 48, 64), seed=0, batch_size=2)
        >>> [side(number) for number in range(8)]
        [64, 64, 64, 64, 48, 48, 48, 48]
    """

    def __init__(self, sides: Sequence[int], seed: int, batch_size: int) -> None:
        self.sides, self.seed, self.batch_size = tuple(sides), seed, batch_size

    def __call__(self, number: int) -> int:
        """The side of crop ``number``: a function of the seed and the step."""
        # Another counter than the crops', which draw from the same keys.
        bits = np.random.Philox(key=[self.seed, number // self.batch_size], counter=[0, 0, 0, 1])
        return self.sides[int(np.random.Generator(bits).integers(len(self.sides)))]


class Crops(torch.utils.data.Dataset[Tensor]):
    """Random crops with flips: item i depends on (seed, i) only.

    Args:
        images: to cut from.
        size: side of a crop, or a function of its number that gives it, such as :class:`StepSides`. Images must have
            been opened for the largest.
        seed: of the run.
        shuffle_channels: share of the crops whose colour channels are permuted, so that a few photographs teach many
            hues.
    """

    def __init__(
        self, images: ImageSet, size: int | Callable[[int], int], seed: int, shuffle_channels: float = 0.0
    ) -> None:
        self.images, self.size, self.seed, self.shuffle_channels = images, size, seed, shuffle_channels

    def __getitem__(self, index: int) -> Tensor:
        """Crop number ``index`` as uint8 (3, size, size)."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        side = self.size if isinstance(self.size, int) else self.size(index)
        pixels = self.images.draw(index, random)
        top = int(random.integers(pixels.shape[0] - side + 1))
        left = int(random.integers(pixels.shape[1] - side + 1))
        crop = pixels[top : top + side, left : left + side]
        if random.integers(2):
            crop = crop[:, ::-1]
        if random.random() < self.shuffle_channels:
            crop = crop[..., random.permutation(3)]
        return torch.from_numpy(crop.transpose(2, 0, 1).copy())


def evaluation_crops(images: ImageSet, size: int, per_image: int, most: int = 512) -> tuple[Tensor, list[str]]:
    """Crops on a fixed grid, the same for every seed.

    Args:
        images: held-out images.
        size: side of a crop.
        per_image: grid of about this many crops per image.
        most: no more crops than this in total; of many images every n-th is used.

    Returns:
        uint8 (N, 3, size, size) and the name of the image of each crop.
    """
    stride = -(-len(images) * per_image // most) if len(images) * per_image > most else 1
    crops, names = [], []
    for index in range(0, len(images), stride):
        pixels = images[index]
        rows, columns = _grid(pixels.shape[0] / pixels.shape[1], per_image)
        for top in _starts(pixels.shape[0], size, rows):
            for left in _starts(pixels.shape[1], size, columns):
                crops.append(pixels[top : top + size, left : left + size].transpose(2, 0, 1))
                names.append(images.names[index])
    return torch.from_numpy(np.stack(crops)), names


def _grid(aspect: float, count: int) -> tuple[int, int]:
    """Rows and columns, about ``count`` together, in the shape of the image."""
    rows = min(max(1, round((count * aspect) ** 0.5)), count)
    return rows, max(1, count // rows)


def _starts(length: int, size: int, count: int) -> list[int]:
    """``count`` starts spread evenly over ``length``, none twice."""
    last = length - size
    if count == 1:
        return [last // 2]
    return sorted({round(i * last / (count - 1)) for i in range(count)})


def sample_crops(
    images: ImageSet, size: int, multiple: int, count: int, largest: int = 192
) -> tuple[Tensor, list[str]]:
    """Larger squares for the eye: as large as the images allow, up to ``largest``, from the middle outwards.

    Args:
        images: held-out images.
        size: smallest side (the training crops').
        multiple: the side is a multiple of this.
        count: number of squares, taken from the images in turn.
        largest: longest side.

    Returns:
        uint8 (N, 3, side, side) and names.
    """
    taken = min(count, len(images))
    chosen = [round(i * (len(images) - 1) / max(1, taken - 1)) for i in range(taken)]
    shortest = min(min(images[i].shape[:2]) for i in chosen)
    side = max(size, min(shortest, largest) // multiple * multiple)
    crops, names = [], []
    for turn in range(count):
        pixels = images[chosen[turn % len(chosen)]]
        height, width = pixels.shape[:2]
        # First the middle, then the thirds to the left and right: different parts of the same photograph.
        shift = (0.5, 0.15, 0.85)[turn // len(chosen) % 3]
        top, left = round((height - side) * 0.5), round((width - side) * shift)
        crops.append(pixels[top : top + side, left : left + side].transpose(2, 0, 1))
        names.append(images.names[chosen[turn % len(chosen)]])
    return torch.from_numpy(np.stack(crops)), names
