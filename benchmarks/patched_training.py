"""A residual quantizer of vector-quantize-pytorch trained on photographs, as it is and patched: loss and time.

Run ``python -m benchmarks.patched_training``; writes ``benchmarks/results/<device>/patched-training.json``.
Steps of the two models alternate, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import environment as env

IMAGES = ("astronaut", "chelsea", "coffee", "rocket")
SIDE = 8


def patches() -> Tensor:
    """All 8 x 8 colour patches on a grid of stride 4 of scikit-image's photographs, in [-1, 1]: (N, 192)."""
    from skimage import data

    found = []
    for name in IMAGES:
        image = torch.from_numpy(np.asarray(getattr(data, name)())[..., :3].copy()).float() / 127.5 - 1.0
        windows = image.unfold(0, SIDE, 4).unfold(1, SIDE, 4)
        found.append(windows.reshape(-1, 3 * SIDE * SIDE))
    return torch.cat(found)


class Autoencoder(nn.Module):
    """Linear layers around a k-means-initialised ResidualVQ that replaces dead codes."""

    def __init__(self, dim: int = 32, codes: int = 256, levels: int = 4, rotation: bool = True) -> None:
        from vector_quantize_pytorch import ResidualVQ

        super().__init__()
        inputs = 3 * SIDE * SIDE
        self.encoder = nn.Sequential(nn.Linear(inputs, 128), nn.GELU(), nn.Linear(128, dim))
        self.quantizer = ResidualVQ(
            dim=dim,
            codebook_size=codes,
            num_quantizers=levels,
            kmeans_init=True,
            threshold_ema_dead_code=2,
            rotation_trick=rotation,
        )
        self.decoder = nn.Sequential(nn.Linear(dim, 128), nn.GELU(), nn.Linear(128, inputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, losses = self.quantizer(self.encoder(x).unsqueeze(0))
        return F.mse_loss(self.decoder(quantized).squeeze(0), x), losses.sum()


def train(seed: int, steps: int, batch: int, **options: Any) -> dict[str, dict[str, float]]:
    """Both variants from one state on the same batches: loss on rows that were not trained on, seconds per step."""
    import vqkernels

    data = patches()
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    held_out, data = data[:4096], data[4096:]
    models, optimizers = {}, {}
    for name in ("original", "patched"):
        torch.manual_seed(seed)
        models[name] = Autoencoder(**options)
        optimizers[name] = torch.optim.Adam(models[name].parameters(), lr=2e-3)
    assert vqkernels.patch(models["patched"], strict=True).replaced
    seconds: dict[str, list[float]] = {name: [] for name in models}
    cpu_seconds = dict.fromkeys(models, 0.0)  # of all threads: less at the mercy of what else the machine does
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = data[torch.randint(len(data), (batch,), generator=draw)]
        for name, model in models.items():
            torch.manual_seed(1000 * seed + step)
            begin, cpu_begin = time.perf_counter(), time.process_time()
            reconstruction, commitment = model(x)
            optimizers[name].zero_grad()
            (reconstruction + 0.25 * commitment).backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - begin)
            cpu_seconds[name] += time.process_time() - cpu_begin
    found = {}
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            loss = model(held_out)[0].item()
        found[name] = {
            "held_out_mse": loss,
            "total_s": sum(seconds[name]),
            "total_cpu_s": cpu_seconds[name],
            "median_step_ms": 1e3 * statistics.median(seconds[name][1:]),
            "first_step_ms": 1e3 * seconds[name][0],  # with k-means
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = [train(seed, arguments.steps, arguments.batch) for seed in range(arguments.seeds)]
    for seed, run in enumerate(runs):
        a, b = run["original"], run["patched"]
        print(
            f"seed {seed}: held-out mse {a['held_out_mse']:.5f} -> {b['held_out_mse']:.5f}, "
            f"median step {a['median_step_ms']:.1f} -> {b['median_step_ms']:.1f} ms, "
            f"in all {a['total_s']:.1f} -> {b['total_s']:.1f} s, "
            f"processor time {a['total_cpu_s']:.1f} -> {b['total_cpu_s']:.1f} s"
        )
    settings = vars(arguments) | {"images": IMAGES, "side": SIDE, "dim": 32, "codes": 256, "levels": 4}
    path = env.results_folder() / "patched-training.json"
    about = {**env.describe(arguments.threads), "commit": env.commit(), "date": env.now()}
    env.write_json(path, {**about, "settings": settings, "seeds": runs})


if __name__ == "__main__":
    main()
