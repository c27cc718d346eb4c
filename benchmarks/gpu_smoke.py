"""Every op on every backend that runs on a device, on small awkward cases, against the reference on the CPU.

``python -m benchmarks.gpu_smoke``; the driver runs it by itself and under compute-sanitizer, so it is short.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor


def _layouts(x: Tensor) -> list[Tensor]:
    return [x, x.transpose(-1, -2).contiguous().transpose(-1, -2)]


# As VQKERNELS_CUDA_SCREEN has them; on other GPUs than Hopper "wgmma" is mma.sync too.
SCREENS = ("wgmma", "mma")


@contextlib.contextmanager
def _screen(name: str) -> Iterator[None]:
    """A screen for searches that the CUDA library would do without one."""
    from vqkernels import _cuda_nearest

    before, work = os.environ.get("VQKERNELS_CUDA_SCREEN"), _cuda_nearest.DIRECT_WORK
    order = ("float64", "mma", "wgmma", "auto", "")
    # What the driver ruled out stays so.
    os.environ["VQKERNELS_CUDA_SCREEN"] = min(name, before or "auto", key=order.index)
    _cuda_nearest.DIRECT_WORK = 0
    try:
        yield
    finally:
        _cuda_nearest.DIRECT_WORK = work
        os.environ.pop("VQKERNELS_CUDA_SCREEN")
        if before is not None:
            os.environ["VQKERNELS_CUDA_SCREEN"] = before


def run(device: torch.device, backend: str, most_rows: int = 3000) -> int:
    """Run all cases with up to so many rows.

    Returns:
        The number of calls compared.

    Raises:
        AssertionError: a result differs.
    """
    from vqkernels import Unsupported, ops

    torch.manual_seed(0)
    compared = 0

    def same(op: str, *args: object, exact: bool = True) -> None:
        nonlocal compared
        function = getattr(ops, op)
        there = [
            [e.to(device) for e in a] if isinstance(a, list) else a.to(device) if isinstance(a, Tensor) else a
            for a in args
        ]
        try:
            found = function(*there, backend)
        except Unsupported:
            return
        expected = function(*args, "reference")
        if found is None:  # in place
            found, expected = there[:3], args[:3]
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple | list) else [(found, expected)]
        for a, b in pairs:
            if exact:
                what = f"{op} on {backend}: {[getattr(x, 'shape', x) for x in args]}"
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True, msg=what)
            else:
                torch.testing.assert_close(a.cpu(), b, rtol=2e-5, atol=2e-5, msg=f"{op} on {backend}")
        compared += 1

    for h, n, k, d in (
        (1, 1, 1, 1),
        (1, 33, 100, 3),
        (2, 65, 300, 8),
        (1, 70, 1030, 40),
        (1, 3000, 257, 64),
        (1, 9, 500, 256),
    ):
        if n > most_rows:
            continue
        x, codes = torch.randn(h, 1, n, d), torch.randn(h, k, d)
        x[..., ::3, :] = codes[:, torch.randint(k, (len(range(0, n, 3)),))][:, None]
        for metric in ("l2", "cosine", "dot"):
            same("nearest", x, codes, metric, "exact")
        for name in SCREENS if backend == "native" else ():  # whatever the plan would choose for so few rows
            with _screen(name):
                same("nearest", x, codes, "l2", "exact")
        same("nearest", x.half(), codes.half(), "l2", "exact")
        same("nearest", x.bfloat16(), codes, "l2", "exact")
        for z in _layouts(x):
            same("residual_nearest", z, [codes, codes[:, : k // 2 + 1] * 0.5, codes.half() * 0.25], z is not x)
        indices = torch.randint(-1, k, (h, 1, n))
        same("codebook_sum", x, indices, k, exact=False)
        for z in _layouts(x):
            same("lookup", codes, indices, z is not x, None)
            for gradient in ("straight_through", "rotation", "none"):
                same("quantize_grad", torch.randn_like(z), z, codes, indices, torch.tensor(0.3), gradient, z is not x,
                     exact=False)  # fmt: skip
        for distance in (None, torch.rand(h, 1, n)):
            same("quantize_output", x, codes, indices, distance, True, False, exact=False)
        counts = torch.randint(0, 9, (h, k)).float()
        same("ema_update", torch.rand(h, k) + 1, codes.clone(), codes.clone(), counts, codes.clone(), 0.9, 1e-5, False,
             exact=False)  # fmt: skip
        weight, values = (torch.rand(h, n) > 0.1) / n, torch.randn(h, k, d)
        same("soft_assign", x[:, 0], codes, weight, True, 2.0 * d, exact=False)
        for says in ((torch.randn(h), torch.randn(h, k), None, None), (None, None, torch.randn(h, n, d), values)):
            same("soft_assign_grad", x[:, 0], codes, weight, *says, says[0] is None, 2.0 * d, exact=False)
    x, codes = torch.randn(1, 1, 40, 6), torch.randn(1, 60, 6)
    x[0, 0, 2, 3], codes[0, 4, 2], codes[0, 9, 1], codes[0, 20:50] = (
        float("nan"),
        float("nan"),
        float("inf"),
        codes[0, 3],
    )
    for metric in ("l2", "dot"):
        same("nearest", x, codes, metric, "exact")
    same("residual_nearest", x, [codes] * 3, False)
    return compared


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_smoke", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    from benchmarks import gpu_peers

    os.environ.pop("VQKERNELS_BACKEND", None)
    names = gpu_peers.backends(device)
    for name in names:
        print(f"{name}: {run(device, name)} calls agree with the reference on the CPU", flush=True)
    if not names:
        print(f"no backend but the reference runs on {device}")
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0 if names else 1


if __name__ == "__main__":
    sys.exit(main())
