"""The search kernels as nvcc compiled them (tensor cores, registers, instructions per pair), and their plans.

What runs is tested in hosted_nearest.py; here stands what only a compiler knows. Speed is counted, not measured.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest
from cuda_host import cuobjdump, installed, kernels

from vqkernels._cuda_nearest import CHUNK_ROWS, DIRECT, DIRECT_ROWS, SCRATCH_ELEMENTS, SM80, SM90, Device, plan

H100, A100, B200 = Device((9, 0), 132), Device((8, 0), 108), Device((10, 0), 148)
# Width and number of panels, blocks of rows per warp group, whether the sums have the bias in them.
SCREENS90 = (
    *((width, 1, 2, folded) for width in (16, 32) for folded in (False, True)),
    (64, 1, 2, False), (32, 3, 2, False), (64, 2, 2, False), (64, 3, 2, False), (64, 4, 2, False), (64, 6, 1, False),
    (64, 8, 1, False),
)  # fmt: skip
SCREENS80 = ((16, 1), (32, 1), (64, 1), (32, 3), (64, 2), (64, 3), (64, 4), (64, 0))


@functools.cache
def code(arch: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction of every search kernel."""
    found: dict[str, list[tuple[int, str]]] = {}
    name = None
    for line in cuobjdump("-sass", "-arch", arch, str(installed())).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1] if "7nearest" in match[1] else None
        elif name and (match := re.match(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", line)):
            found.setdefault(name, []).append((int(match[1], 16), match[2]))
    return found


def screen90(width: int, panels: int, halves: int = 2, folded: bool = False) -> str:
    """The name of a Hopper screen."""
    pattern = rf"screen90ILi{width}ELi{panels}ELi{halves}ELi\d+ELb{int(folded)}E"
    (name,) = (n for n in code("sm_90a") if re.search(pattern, n))
    return name


def operation(text: str) -> str:
    match = re.match(r"(?:@!?U?P\w+ )?([A-Z0-9_]+)", text)
    assert match, text
    return match[1]


def hot_loop(instructions: list[tuple[int, str]], product: str) -> list[str]:
    """The smallest loop with matrix products and maxima: the screen's steady state."""
    loops = []
    for at, text in instructions:
        if "BRA" in text and (match := re.search(r"0x([0-9a-f]+)", text)) and int(match[1], 16) <= at:
            body = [operation(t) for a, t in instructions if int(match[1], 16) <= a <= at]
            if product in body and "FMNMX" in body:
                loops.append(body)
    return min(loops, key=len)


@pytest.mark.slow
def test_every_screen_is_there_and_uses_the_tensor_cores() -> None:
    for screen in SCREENS90:
        name = screen90(*screen)
        used = Counter(operation(text) for _, text in code("sm_90a")[name])
        assert used["HGMMA"], name
        assert used["UBLKCP"], f"{name} has no bulk copies"
        assert not used["HMMA"], name
    for width, resident in SCREENS80:
        for arch in ("sm_80", "sm_90a"):
            (name,) = (n for n in code(arch) if f"screen80ILi{width}ELi{resident}E" in n)
            used = Counter(operation(text) for _, text in code(arch)[name])
            assert used["HMMA"], name
            assert used["LDGSTS"], f"{name} has no asynchronous copies"
            assert used["LDSM"], name


@pytest.mark.slow
def test_nothing_spills_where_rows_and_codes_stream_by() -> None:
    found = [k for k in kernels() if "7nearest" in k.name]
    assert found
    for kernel in found:
        # 8 bytes: two registers of the longest rows' kernel, saved once per block of rows.
        allowed = 8 if "screen90ILi64ELi8E" in kernel.name else 0
        assert kernel.stack <= allowed, kernel
        assert kernel.registers <= (168 if "screen90" in kernel.name else 255), kernel
    for arch in ("sm_80", "sm_90a"):
        for name, instructions in code(arch).items():
            if "screen80" in name or ("screen90" in name and arch == "sm_90a"):
                loop = hot_loop(instructions, "HGMMA" if "screen90" in name else "HMMA")
                assert not {"STL", "LDL"} & set(loop), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "panels", "folded", "most"),
    [(16, 1, True, 2.05), (32, 1, True, 2.1), (16, 1, False, 3.2), (32, 1, False, 3.25), (64, 1, False, 4.0),
     (64, 2, False, 4.3), (64, 4, False, 5.5)],
)  # fmt: skip
def test_pairs_cost_what_was_counted(width: int, panels: int, folded: bool, most: float) -> None:
    # Two phases of 64 rows x 128 codes: 128 pairs per thread. One addition (unless the sums have the bias) and one
    # maximum each, and the bookkeeping.
    loop = Counter(hot_loop(code("sm_90a")[screen90(width, panels, folded=folded)], "HGMMA"))
    assert loop["FFMA"] <= (16 if folded else 1.15 * 128)
    assert loop["FMNMX"] <= (1.15 if panels == 1 and width < 64 else 1.4) * 128
    assert loop["LDS"] <= 9, "biases are read once for both halves of the rows"
    assert sum(loop.values()) <= most * 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "panels", "folded", "under_way"),
    [(64, 4, False, 2), (32, 1, False, 1), (32, 1, True, 1), (16, 1, True, 1)],
)
def test_products_run_while_the_sums_of_others_are_searched(
    width: int, panels: int, folded: bool, under_way: int
) -> None:
    # ptxas serialises products that it cannot tell from uses of their sums: then it waits for all after each one.
    name = screen90(width, panels, folded=folded)
    waits = [text for _, text in code("sm_90a")[name] if "WARPGROUP.DEPBAR" in text]
    assert any(f"gsb0, {under_way:#x}" in text for text in waits), waits
    # After the last phase of an item only: there are two ways to end one.
    assert sum("gsb0, 0x0" in text for text in waits) <= 2, f"{waits}: they were serialised"


@pytest.mark.slow
def test_decisions_are_not_fused() -> None:
    for arch in ("sm_80", "sm_90a"):
        for stem in ("decide", "scan_rows"):
            (name,) = (n for n in code(arch) if stem in n)
            used = Counter(operation(text) for _, text in code(arch)[name])
            assert used["DADD"], name
            assert used["DMUL"], name


@pytest.mark.parametrize("device", [H100, A100, B200], ids=["H100", "A100", "B200"])
def test_plans_are_valid_and_bound_memory(device: Device) -> None:
    for heads in (1, 2, 8, 300):
        for rows in (1, 63, 257, 65536, 10**6, 2**33):
            for codes in (1, 100, 16384, 2**20):
                for dim in (1, 8, 256, 512, 513, 4096):
                    chosen = plan(heads, rows, codes, dim, device)
                    if chosen.screen == DIRECT:
                        assert heads * rows <= DIRECT_ROWS
                        continue
                    assert 1 <= chosen.splits <= max(1, -(-codes // 128))
                    assert chosen.chunk_rows <= rows
                    assert chosen.chunk_rows == rows or chosen.chunk_rows % 256 == 0
                    assert heads * chosen.chunk_rows <= max(CHUNK_ROWS, 256 * heads)
                    assert heads * chosen.chunk_rows * dim <= max(SCRATCH_ELEMENTS, 256 * heads * dim)


def test_plans_follow_the_machine() -> None:
    assert plan(1, 65536, 16384, 256, H100)[:2] == (SM90, 1)
    assert plan(1, 65536, 16384, 256, A100).screen == SM80
    assert plan(1, 65536, 16384, 256, B200).screen == SM80  # wgmma is Hopper's alone
    assert plan(1, 65536, 16384, 513, H100).screen == SM80
    assert plan(1, 1, 2048, 256, H100).screen == DIRECT
    # Few rows: codes are split until the machine is full.
    few = plan(1, 512, 16384, 256, H100)
    assert 2 * few.splits >= 100
    # 188 blocks of rows on 132 multiprocessors would leave half of the second wave idle.
    assert plan(1, 48000, 1024, 128, H100).splits > 1
