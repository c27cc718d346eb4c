"""Perceptual losses: LPIPS where its weights lie on this machine, and a Laplacian pyramid that needs none.

Called by :class:`vqkernels.models.VQGANLoss` and by evaluation; downloads nothing. Sources: Zhang et al. 2018, "The
Unreasonable Effectiveness of Deep Features as a Perceptual Metric"; Burt and Adelson 1983 (the pyramid); Ling and Okada
2006 and Bojanowski et al. 2018, "Optimizing the Latent Space of Generative Networks" (the L1 distance of pyramids).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LPIPS", "LaplacianPyramidLoss", "find_lpips"]

# torchvision's numbering of `features`: convolutions (in, out, kernel, stride, padding), "M" a max-pool.
_VGG: tuple[int | str, ...] = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
_ALEX: tuple[tuple[int, int, int, int, int] | str, ...] = (
    (3, 64, 11, 4, 2), "M", (64, 192, 5, 1, 2), "M", (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)
)  # fmt: skip
# The ReLUs whose outputs are compared, by torchvision's number.
_TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
_CHECKPOINTS = {"vgg": "vgg16-*.pth", "alex": "alexnet-*.pth"}


def _layers(net: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    if net == "vgg":
        width = 3
        for step in _VGG:
            if isinstance(step, int):
                layers += [nn.Conv2d(width, step, 3, padding=1), nn.ReLU()]
                width = step
            else:
                layers.append(nn.MaxPool2d(2, 2))
    else:
        for part in _ALEX:
            if isinstance(part, str):
                layers.append(nn.MaxPool2d(3, 2))
            else:
                layers += [nn.Conv2d(part[0], part[1], part[2], part[3], part[4]), nn.ReLU()]
    return nn.Sequential(*layers)


def find_lpips(net: str = "vgg") -> tuple[Path, Path] | str:
    """The files of LPIPS on this machine: torchvision's network and the linear weights.

    The network is looked for in ``VQKERNELS_LPIPS`` (a folder), then in torch.hub's cache; the linear weights
    (``vgg.pth`` or ``alex.pth``, as the lpips package and torchmetrics ship them) there too, then in torchmetrics.

    Args:
        net: "vgg" or "alex".

    Returns:
        The two files, or the reason why there are none.

    Raises:
        ValueError: ``net`` is neither.
    """
    if net not in _TAPS:
        raise ValueError(f"net is {net!r}; expected 'vgg' or 'alex'")
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if given := os.environ.get("VQKERNELS_LPIPS"):
        folders.insert(0, Path(given))
    network = next((f for folder in folders for f in sorted(folder.glob(_CHECKPOINTS[net]))), None)
    if (spec := importlib.util.find_spec("torchmetrics")) is not None and spec.submodule_search_locations:
        folders.append(Path(spec.submodule_search_locations[0]) / "functional" / "image" / "lpips_models")
    linear = next((f for folder in folders if (f := folder / f"{net}.pth").is_file()), None)
    if network is None:
        where = " or ".join(map(str, folders[: 2 if given else 1]))
        return f"torchvision's weights ({_CHECKPOINTS[net]}) are not in {where}; set VQKERNELS_LPIPS to their folder"
    if linear is None:
        return f"the linear weights {net}.pth are not beside {network}; pip install torchmetrics ships them"
    return network, linear


class LPIPS(nn.Module):
    """Learned perceptual distance of images in [0, 1]: squared differences of unit features, weighted, averaged.

    Args:
        net: "vgg" (training losses) or "alex" (evaluation).

    Raises:
        FileNotFoundError: the weights are not on this machine; the message says where they were looked for.
        ValueError: a file holds other weights.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str = "vgg") -> None:
        super().__init__()
        found = find_lpips(net)
        if isinstance(found, str):
            raise FileNotFoundError(f"LPIPS is not available: {found}")
        self.net, self.taps = net, _TAPS[net]
        self.features = _layers(net)
        convolutions = {i: layer for i, layer in enumerate(self.features) if isinstance(layer, nn.Conv2d)}
        widths = [convolutions[tap - 1].out_channels for tap in self.taps]
        self.linear = nn.ParameterList(nn.Parameter(torch.zeros(w)) for w in widths)
        network, linear = (torch.load(f, map_location="cpu", weights_only=True) for f in found)
        own = {k.removeprefix("features."): v for k, v in network.items() if k.startswith("features.")}
        _copy(self.features.state_dict(), own, found[0])
        targets = {f"lin{i}.model.1.weight": p.data.view(1, -1, 1, 1) for i, p in enumerate(self.linear)}
        _copy(targets, linear, found[1])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode."""
        return super().train(False)

    def _unit(self, images: Tensor) -> list[Tensor]:
        x = (images * 2 - 1 - self.shift) / self.scale
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-8))
        return found

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Mean distance, 0-d.

        Args:
            images: (B, 3, H, W) in [0, 1].
            reconstruction: the same shape.
        """
        total = images.new_zeros(())
        for a, b, w in zip(self._unit(images), self._unit(reconstruction), self.linear, strict=True):
            total = total + ((a - b).square() * w.view(1, -1, 1, 1)).sum(1).mean()
        return total


def _copy(targets: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Path) -> None:
    for name, target in targets.items():
        if name not in state or state[name].shape != target.shape:
            got = tuple(state[name].shape) if name in state else "nothing"
            raise ValueError(
                f"{source} does not hold the weights of LPIPS: {name} is {got}, expected {tuple(target.shape)}"
            )
        target.copy_(state[name])


class LaplacianPyramidLoss(nn.Module):
    """Mean absolute difference of the bands of a Laplacian pyramid, averaged over the bands.

    A band holds the edges of one scale, so a blurred edge costs at every scale that it is missing from, and the fine
    scales count as much as the coarse ones, which hold nearly all of the squared error.

    Args:
        levels: bands, at most; fewer for small images. The last one is the remaining low-pass image.
    """

    kernel: Tensor

    def __init__(self, levels: int = 4) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels is {levels!r}; expected an integer >= 1")
        self.levels = levels
        line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("kernel", torch.outer(line, line)[None, None], persistent=False)

    def _blur(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 5, 5)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """The loss, 0-d float32.

        Args:
            images: (B, C, H, W); sides of at least 3.
            reconstruction: the same shape.
        """
        # The pyramid is linear: that of the difference is the difference of the pyramids.
        x = (reconstruction - images).float()
        bands = []
        for _ in range(self.levels - 1):
            if min(x.shape[-2:]) < 6:
                break
            low = F.avg_pool2d(self._blur(x), 2)
            bands.append((x - F.interpolate(low, size=x.shape[-2:], mode="bilinear")).abs().mean())
            x = low
        return torch.stack([*bands, x.abs().mean()]).mean()
