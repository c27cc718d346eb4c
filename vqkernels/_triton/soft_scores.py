# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""What the Triton kernels of ``soft_assign`` and ``soft_assign_grad`` share: tiles, precision, how work is divided.

Called by ``ops/soft_assign/triton.py`` and ``ops/soft_assign_grad/triton.py``. One product in TF32 would not do: what
it loses would be divided by the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton

# Programs that fill the GPUs there are, twice over; results must not depend on which one it is.
PROGRAMS = 256
# Fewer codes are not worth a program of their own, nor are fewer rows.
LEAST_CODES, LEAST_ROWS = 512, 256
# exp of less is 0 in float32; to multiply 0 with something finite keeps NaN out.
LEAST = tl.constexpr(-104.0)


class Tile(NamedTuple):
    """What a kernel is launched with: rows, codes, and dims at a time; warps, and tiles in flight."""

    rows: int
    codes: int
    dims: int
    warps: int
    stages: int

    def options(self, dims: int) -> dict[str, int]:
        """For rows of so many dims."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.codes,
            "BLOCK_D": min(self.dims, max(16, _triton.power_of_two(dims))),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Machine(NamedTuple):
    """How a kind of GPU is launched: precision of ``tl.dot``; tiles of scores alone, of dx and of dcodes."""

    precision: str
    scores: Tile
    dx: Tile
    dcodes: Tile


def machine(device: torch.device, dims: int, soft: bool = False) -> Machine:
    """NVIDIA: three TF32 products, near float32 (docs/gpu.md). AMD's matrix cores take float32 as it is.

    Tiles are as large as registers allow, which only a compiler knows: test_triton_compiles.py asks it. Hopper's matrix
    instruction takes 64 rows, and larger tiles need fewer instructions for each of their pairs (benchmarks/NOTES.md).
    """
    small = Tile(64, 64, 16, 8, 2)
    if torch.version.hip is not None:
        return Machine("ieee", small, Tile(64, 64, 16, 8, 3), Tile(64, 64, 16, 8, 3))
    if capability(device) == 9 and (dims <= 16 or dims % 16 == 0):
        wide = Tile(128, 64, 32, 8, 2)
        return Machine("tf32x3", wide, Tile(128, 32, 32, 8, 1), Tile(32, 128, 16 if soft else 32, 8, 1))
    warps = 4 if 16 < dims <= 32 else 8
    return Machine("tf32x3", small, Tile(64, 32, 16, warps, 3), Tile(32, 64, 16, warps, 3))


def capability(device: torch.device) -> int:
    """The major version of NVIDIA's GPUs; 0 of what is none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def dense(x: Tensor) -> Tensor:
    """The same with the dims of a row or code side by side: a copy is nothing beside the products."""
    return x if x.stride(-1) == 1 else x.contiguous()


def splits(heads: int, rows: int, codes: int, tiles: tuple[Tile, ...]) -> tuple[int, int]:
    """Among how many programs the codes of each tile of rows are divided, and how many codes each of them has."""
    wanted = _triton.ceil_div(PROGRAMS, heads * _triton.ceil_div(rows, max(t.rows for t in tiles)))
    step = max(t.codes for t in tiles)
    each = max(LEAST_CODES, step * _triton.ceil_div(codes, wanted * step))
    return _triton.ceil_div(codes, each), each


def chunks(heads: int, rows: int, codes: int, tile: Tile, most: int = 64) -> tuple[int, int]:
    """Among how many programs the rows of each tile of codes are divided, at most ``most``, and how many each has."""
    wanted = min(most, _triton.ceil_div(PROGRAMS, heads * _triton.ceil_div(codes, tile.codes)))
    each = max(LEAST_ROWS, tile.rows * _triton.ceil_div(rows, wanted * tile.rows))
    return _triton.ceil_div(rows, each), each


def merged(stats: list[Tensor], by: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Of all codes, from each split's (splits, H, N): largest score, sum of e = exp(score - largest), and a third.

    That one is the sum of e (a - by * (score - largest)): a larger score moves all differences by the same.
    """
    top, total, inner = stats
    if len(top) == 1:
        return top[0], total[0], inner[0]
    best = top.amax(0)
    shift = (top - best).clamp_(min=LEAST.value)
    scale = shift.exp()
    return best, (scale * total).sum(0), (scale * (inner - by * shift * total)).sum(0)


@triton.jit
def tile_products(
    x_start, x_dim, codes, c_code, c_dim, row_ok, code, num_codes, dim,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x.c (BLOCK_M, BLOCK_N) of the rows at the pointers ``x_start`` and the codes with the given numbers."""
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, dim, BLOCK_D):
        d = first + lane
        a = tl.load(x_start[:, None] + (d * x_dim)[None, :], mask=row_ok[:, None] & (d < dim)[None, :], other=0.0)
        at = codes + (code * c_code)[None, :] + (d * c_dim)[:, None]
        b = tl.load(at, mask=(code < num_codes)[None, :] & (d < dim)[:, None], other=0.0)
        if PRECISION == "tf32x3" and a.dtype.primitive_bitwidth == 16 and b.dtype.primitive_bitwidth == 16:
            # 11 bits or fewer: TF32 holds them, and products are exact.
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="tf32")
        else:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def tile_scores(
    x_start, x_dim, codes, c_code, c_dim, offset, row_ok, code, num_codes, dim, scale, factor,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """score / temperature, minus infinity beyond the last code."""
    product = tile_products(
        x_start, x_dim, codes, c_code, c_dim, row_ok, code, num_codes, dim, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
    )
    taken = tl.load(offset + code, mask=code < num_codes, other=0.0)
    score = (product * scale - taken[None, :]) * factor
    return tl.where((code < num_codes)[None, :], score, float("-inf"))


@triton.jit
def above(best, z, score):
    """With one more tile of scores: each row's largest, how far the sums so far come down, score - largest."""
    new = tl.maximum(best, tl.max(score, 1))
    shift = tl.where(z > 0, tl.maximum(best - new, LEAST), 0.0)
    d = score - new[:, None]
    return new, shift, tl.where(d < LEAST, LEAST, d)  # NaN stays


@triton.jit
def tile_says(
    x_start, g_start, g_dim, values, v_code, v_dim, usage, row_ok, code, num_codes, dim,
    SOFT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the loss says of p but for its entropy, (BLOCK_M, BLOCK_N)."""
    said = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + tl.load(usage + code, mask=code < num_codes, other=0.0)[None, :]
    if SOFT:
        said += tile_products(
            g_start, g_dim, values, v_code, v_dim, row_ok, code, num_codes, dim, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
        )
    return said
