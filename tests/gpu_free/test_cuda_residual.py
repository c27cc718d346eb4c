"""``residual_nearest`` as nvcc compiled it, and its plans; what runs is tested in hosted_residual.py."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from cuda_host import cuobjdump, installed, kernels
from test_cuda_nearest import A100, B200, H100, operation

from vqkernels._cuda_nearest import DIRECT, SM80, SM90, Device
from vqkernels._cuda_residual import MOST_DIMS, MOST_LEVELS, plan


def sums(arch: str, kernel: str) -> list[Counter[str]]:
    """Operations of the loops of a kernel that only add up squares, the shortest first."""
    listing, found = cuobjdump("-sass", "-arch", arch, str(installed())), []
    (part,) = (p for p in listing.split("Function : ")[1:] if kernel in p.split("\n")[0])
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", part)]
    for at, text in code:
        if "BRA" in text and (match := re.search(r"0x([0-9a-f]+)", text)) and int(match[1], 16) < at:
            body = Counter(operation(t) for a, t in code if int(match[1], 16) <= a <= at)
            if body["DADD"] == 2 * body["DMUL"] > 0 and not body["LDG"]:
                found.append(body)
    return sorted(found, key=Counter.total)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [256, 512])
def test_a_pair_takes_three_operations_in_float64_and_two_more(dims: int) -> None:
    # For one, two and four rows of a warp, 8 dims at a time: two loads of shared memory per two dims, none per pair.
    loops = sums("sm_90a", f"search_fewILi{dims}E")
    for rows, body in zip((1, 2, 4), loops, strict=True):
        pairs = 8 * rows
        assert (body["DMUL"], body["DADD"]) == (pairs, 2 * pairs)
        assert body["LDS"] <= 4 + 4 * rows
        assert body.total() <= 5 * pairs
        assert not {"DFMA", "F2F", "LDL", "STL"} & set(body)


@pytest.mark.slow
def test_blocks_are_small_enough_for_several_to_be_resident() -> None:
    found = [k for k in kernels() if "10search_few" in k.name]
    assert {k.arch for k in found} >= {"sm_80", "sm_90a"}
    assert all(k.registers <= 128 and k.stack == 0 for k in found)


def test_plans_follow_the_work() -> None:
    assert plan(1, 1, [2048] * 32, 256, H100).screen == DIRECT
    assert plan(1, 64, [2048] * 32, 256, H100).screen == DIRECT
    assert plan(1, 65, [2048] * 32, 256, H100).screen == SM90
    assert plan(1, 64, [2048] * 8 + [4096], 256, H100).screen == SM90, "the largest level counts"
    assert plan(1, 48000, [1024] * 8, 128, H100).screen == SM90
    assert plan(1, 48000, [1024] * 8, 128, A100).screen == plan(1, 48000, [1024] * 8, 128, B200).screen == SM80
    assert plan(1, 4, [100] * MOST_LEVELS, MOST_DIMS, H100).screen == DIRECT
    assert plan(1, 4, [100] * (MOST_LEVELS + 1), MOST_DIMS, H100).screen == SM90
    assert plan(1, 4, [100], MOST_DIMS + 1, H100).screen == SM80
    ada = Device((8, 9), 128)
    assert (plan(1, 1, [2048], 256, ada).screen, plan(1, 3, [2048], 256, ada).screen) == (DIRECT, SM80), (
        "little float64"
    )
    # Every tile of rows needs a block that is resident.
    assert plan(132, 16, [100], 8, H100).screen == SM90, "more rows than a search without a screen takes"
    assert plan(60, 17, [100], 8, H100).screen == DIRECT
    assert plan(140, 1, [100], 8, H100).screen == SM90
