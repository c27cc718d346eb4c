"""What threads do together on the PTX machine: shuffles, votes, barriers; in every order; and what is wrong there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ptx_machine import SEEDS, Module, PtxError, set_seed
from ptx_truth import integers, signed

FULL = 0xFFFFFFFF


@pytest.fixture(autouse=True, params=SEEDS)
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    set_seed(request.param)
    yield request.param
    set_seed(0)


def run(body: str, threads: int = 32, shared: int = 256, **inputs: Any) -> list[int]:
    """%r1 of each thread at the end. %r0 is the thread; %a, %b, %c are words of the inputs a, b, c."""
    out = np.full(threads, 0xDEAD, np.uint32)
    loads, arrays = "", []
    for name, values in inputs.items():
        loads += f"ld.param.u64 %rd2, [{name}]; add.s64 %rd2, %rd2, %rd1; ld.global.b32 %{name}, [%rd2];"
        arrays.append(np.array(values, np.uint32))
    module = Module(f"""
        .version 8.6
        .target sm_90a
        .address_size 64
        .extern .shared .align 16 .b8 dynamic[];
        .visible .entry k({", ".join(f".param .u64 {name}" for name in ("out", *inputs))}) {{
            .reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %rd<8>; .reg .b32 %a; .reg .b32 %b; .reg .b32 %c;
            mov.u32 %r0, %tid.x; mov.u32 %r1, 0;
            mul.wide.u32 %rd1, %r0, 4;
            {loads}
            {body}
        end:
            ld.param.u64 %rd2, [out]; add.s64 %rd2, %rd2, %rd1; st.global.u32 [%rd2], %r1;
            ret;
        }}""")
    module.launch("k", 1, threads, out.ctypes.data, *(array.ctypes.data for array in arrays), shared=shared)
    return [int(x) for x in out]


# ---- shuffles ----


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and whether it is in range, as the manual says."""
    offset, clamp, segment = b & 31, c & 31, c >> 8 & 31
    first = lane & segment
    last = first | (clamp & ~segment & 31)
    j = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset, "idx": first | (offset & ~segment)}[mode]
    inside = j >= last if mode == "up" else j <= last
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    values = integers(32, 32)
    for c in (0, 0x1F, 0x181F, 0x1C1F, 0x1E00, 0x1010, 0x0C07):
        offsets = [(7 * k + 3) % 40 for k in range(32)] if mode == "idx" else [k % 11 for k in range(32)]
        line = f"shfl.sync.{mode}.b32 %r2|%p1, %a, %b, %c, -1; selp.u32 %r1, %r2, 0, %p1;"
        inputs = {"a": values, "b": offsets, "c": [c] * 32}
        sources = [shuffled(mode, lane, offsets[lane], c) for lane in range(32)]
        assert run(line, **inputs) == [values[j] if inside else 0 for j, inside in sources]
        assert run(f"shfl.sync.{mode}.b32 %r1, %a, %b, %c, -1;", **inputs) == [values[j] for j, _ in sources]


def test_shuffle_of_its_own_register() -> None:
    assert run("mov.u32 %r1, %r0; shfl.sync.down.b32 %r1, %r1, 1, 0x1f, -1;") == [*range(1, 32), 31]


def test_shuffle_of_halves_that_diverged() -> None:
    body = """
        setp.lt.u32 %p1, %r0, 16;
        mov.u32 %r2, 0xffff; @!%p1 mov.u32 %r2, 0xffff0000;
        @%p1 bra low;
        add.u32 %r0, %r0, 100;
    low:
        shfl.sync.bfly.b32 %r1, %r0, 1, 0x1f, %r2;"""
    assert run(body) == [(k ^ 1) + 100 * (k >= 16) for k in range(32)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("shfl.sync.idx.b32 %r1, %r0, 3, 0x1f, 0xfffffff7;", "not in its own mask"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 ret; shfl.sync.idx.b32 %r1, %r0, 3, 0x1f, -1;",
         "lane 3, which does not take part"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 bra end; shfl.sync.idx.b32 %r1, %r0, 4, 0x1f, 0xfffffff7; "
         "shfl.sync.idx.b32 %r1, %r0, 3, 0x1f, 0xfffffff7;", "lane 3, which does not take part"),
        ("setp.eq.u32 %p1, %r0, 3; @!%p1 vote.sync.ballot.b32 %r1, 1, -1; @%p1 bar.warp.sync 8; bar.sync 0;",
         "deadlock"),
    ],
)  # fmt: skip
def test_masks_that_do_not_hold(body: str, why: str) -> None:
    with pytest.raises(PtxError, match=why):
        run(body)


# ---- votes and the like ----


@pytest.mark.parametrize("ones", [0, FULL, 1, 1 << 31, 0x0F0F0F0F, FULL - 4])
def test_votes(ones: int) -> None:
    bits = {"a": [ones >> k & 1 for k in range(32)]}
    before = "setp.ne.u32 %p1, %a, 0;"
    for mode, expected in {"all": ones == FULL, "any": ones != 0, "uni": ones in (0, FULL)}.items():
        assert run(f"{before} vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;", **bits) == [expected] * 32
        other = {"all": ones == 0, "any": ones != FULL, "uni": ones in (0, FULL)}[mode]
        assert run(f"{before} vote.sync.{mode}.pred %p2, !%p1, -1; selp.u32 %r1, 1, 0, %p2;", **bits) == [other] * 32
    assert run(f"{before} vote.sync.ballot.b32 %r1, %p1, -1;", **bits) == [ones] * 32
    assert run(f"{before} vote.sync.ballot.b32 %r1, %p1, 0xff;", threads=8, a=bits["a"][:8]) == [ones & 255] * 8


def test_matches() -> None:
    values = [k * k % 7 for k in range(32)]
    same = [sum(1 << j for j in range(32) if values[j] == values[k]) for k in range(32)]
    assert run("match.any.sync.b32 %r1, %a, -1;", a=values) == same
    wide = "cvt.u64.u32 %rd3, %a; shl.b64 %rd3, %rd3, 32; match.any.sync.b64 %r1, %rd3, -1;"
    assert run(wide, a=values) == same
    for column, all_same in ((values, False), ([9] * 32, True)):
        line = "match.all.sync.b32 %r2|%p1, %a, -1; selp.u32 %r1, %r2, 77, %p1;"
        assert run(line, a=column) == [FULL if all_same else 77] * 32


def test_groups_of_equal_keys_work_apart() -> None:
    """What aggregated atomics do: each group has a mask of its own, at one instruction."""
    keys = [k % 3 for k in range(32)]
    groups = [sum(1 << j for j in range(32) if keys[j] == keys[k]) for k in range(32)]
    body = """match.any.sync.b32 %r2, %a, -1;
        vote.sync.ballot.b32 %r3, 1, %r2;
        redux.sync.add.u32 %r4, %r0, %r2;
        xor.b32 %r3, %r3, %r2;
        add.u32 %r1, %r3, %r4;"""
    assert run(body, a=keys) == [sum(j for j in range(32) if group >> j & 1) for group in groups]


def test_reductions() -> None:
    values = integers(32, 32)
    results = {
        "add.u32": sum(values),
        "add.s32": sum(values),
        "min.u32": min(values),
        "max.u32": max(values),
        "min.s32": min(values, key=lambda x: signed(x, 32)),
        "max.s32": max(values, key=lambda x: signed(x, 32)),
        "and.b32": int(np.bitwise_and.reduce(values)),
        "or.b32": int(np.bitwise_or.reduce(values)),
        "xor.b32": int(np.bitwise_xor.reduce(values)),
    }
    for op, expected in results.items():
        assert run(f"redux.sync.{op} %r1, %a, -1;", a=values) == [expected & FULL] * 32


def test_one_is_elected() -> None:
    line = "elect.sync %r2|%p1, -1; selp.u32 %r1, 5, %r2, %p1;"
    assert run(line) == [5] + [0] * 31
    assert run("elect.sync _|%p1, -1; selp.u32 %r1, 5, 6, %p1;") == [5] + [6] * 31
    assert run("setp.lt.u32 %p2, %r0, 9; @%p2 ret;" + line)[9:] == [5] + [9] * 22


def test_active_lanes() -> None:
    assert run("activemask.b32 %r1;", threads=12) == [(1 << 12) - 1] * 12
    assert run("setp.lt.u32 %p1, %r0, 5; @%p1 activemask.b32 %r1;") == [31] * 5 + [0] * 27


def test_lanes_meet() -> None:
    """Each lane waits for those of its mask that have not returned, wherever they come from."""
    body = """
        setp.eq.u32 %p1, %r0, 31; @%p1 ret;
        shl.b32 %r2, %r0, 2; mov.u32 %r3, dynamic; add.u32 %r3, %r3, %r2;
        setp.lt.u32 %p2, %r0, 7; @%p2 bra low;
        st.shared.u32 [%r3], %r0;
        bra both;
    low:
        mul.lo.u32 %r4, %r0, 10; st.shared.u32 [%r3], %r4;
    both:
        bar.warp.sync -1;
        xor.b32 %r2, %r2, 12; mov.u32 %r3, dynamic; add.u32 %r3, %r3, %r2; ld.shared.u32 %r1, [%r3];"""
    wrote = [10 * k if k < 7 else k for k in range(31)] + [FULL]
    assert run(body)[:31] == [wrote[k ^ 3] for k in range(31)]


# ---- jumps ----


def test_jumps_by_index() -> None:
    body = """
        and.b32 %r2, %r0, 3;
    ts: .branchtargets zero, one, two, three;
        brx.idx %r2, ts;
    zero: mov.u32 %r1, 10; bra.uni end;
    one: mov.u32 %r1, 11; bra.uni end;
    two: mov.u32 %r1, 12; bra.uni end;
    three: mov.u32 %r1, 13;"""
    assert run(body) == [10 + k % 4 for k in range(32)]
    with pytest.raises(PtxError, match="no target 4"):
        run(body.replace("%r0, 3", "%r0, 7"))


def test_exits() -> None:
    assert run("setp.ge.u32 %p1, %r0, 4; @%p1 exit; mov.u32 %r1, 3;") == [3] * 4 + [0xDEAD] * 28


# ---- barriers ----

EXCHANGE = """
    shl.b32 %r2, %r0, 2; mov.u32 %r3, dynamic; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r0;
    {barrier}
    xor.b32 %r2, %r2, {other}; add.u32 %r4, %r3, %r2; ld.shared.u32 %r1, [%r4];
    {barrier}"""


@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;",
        "barrier.sync 3;",
        "barrier.cta.sync.aligned 15, 128;",
        "bar.cta.sync 1, 128;",
        "mov.u32 %r9, 7; bar.sync %r9;",
    ],
)
def test_barriers(barrier: str) -> None:
    assert run(EXCHANGE.format(barrier=barrier, other=256), threads=128, shared=512) == [k ^ 64 for k in range(128)]


def test_barriers_of_some_warps() -> None:
    """Two pairs of warps, each at a barrier of its own, several times."""
    body = """
        shr.u32 %r8, %r0, 6; add.u32 %r8, %r8, 1; mov.u32 %r10, 0;
    again:"""
    body += EXCHANGE.format(barrier="bar.sync %r8, 64;", other=128)
    body += "add.u32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, 5; @%p1 bra again;"
    assert run(body, threads=128, shared=512) == [k ^ 32 for k in range(128)]


@pytest.mark.parametrize("count", ["", ", 64"])
def test_barriers_from_different_places(count: str) -> None:
    """Not aligned: lanes of one warp come to different instructions."""
    body = f"""
        and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 0;
        @%p1 bra even;
        barrier.sync 0{count};
        bra.uni after;
    even:
        setp.eq.u32 %p2, %r0, 8; @%p2 st.shared.u32 [dynamic], 9;
        barrier.sync 0{count};
    after:
        ld.shared.u32 %r1, [dynamic];"""
    assert run(body, threads=64) == [9] * 64


def test_producers_do_not_wait() -> None:
    """bar.arrive: warp 0 fills, warp 1 empties, by turns."""
    body = """
        mov.u32 %r10, 0; setp.ge.u32 %p1, %r0, 32; @%p1 bra consumer;
    produce:
        bar.sync 2, 64;
        st.shared.u32 [dynamic], %r10;
        bar.arrive 1, 64;
        add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, 6; @%p2 bra produce;
        bra.uni end;
    consumer:
        bar.arrive 2, 64;
    consume:
        bar.sync 1, 64;
        ld.shared.u32 %r2, [dynamic]; mad.lo.u32 %r1, %r1, 10, %r2;
        add.u32 %r10, %r10, 1;
        setp.lt.u32 %p2, %r10, 6;
        @%p2 bar.arrive 2, 64;
        @%p2 bra consume;"""
    assert run(body, threads=64) == [0] * 32 + [12345] * 32


def test_barriers_that_reduce() -> None:
    count = "setp.lt.u32 %p1, %r0, 40; bar.red.popc.u32 %r1, 0, {}%p1;"
    assert run(count.format(""), threads=96) == [40] * 96
    assert run(count.format("!"), threads=96) == [56] * 96
    for op, limit, expected in (("and", 96, 1), ("and", 95, 0), ("or", 1, 1), ("or", 0, 0)):
        line = f"setp.lt.u32 %p1, %r0, {limit}; barrier.red.{op}.pred %p2, 4, 96, %p1; selp.u32 %r1, 1, 0, %p2;"
        assert run(line, threads=96) == [expected] * 96


def test_whole_warps_count_though_lanes_returned() -> None:
    body = """
        setp.eq.u32 %p1, %r0, 40; @%p1 ret; setp.ge.u32 %p1, %r0, 64; @%p1 ret;
        bar.sync 1, 64; bar.sync 2; mov.u32 %r1, 1;"""
    assert run(body, threads=100) == [1] * 40 + [0xDEAD] + [1] * 23 + [0xDEAD] * 36


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("bar.sync 16;", "16 barriers"),
        ("bar.sync 1, 48;", "no multiple of 32"),
        ("bar.arrive 1, 0;", "no multiple of 32"),
        ("setp.lt.u32 %p1, %r0, 32; mov.u32 %r2, 64; @%p1 mov.u32 %r2, 96; bar.sync 1, %r2;", "others wait for"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra twice; bar.sync 1, 128; bra.uni end;"
         "twice: bar.arrive 1, 128; bar.arrive 1, 128;", "a second time"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra red; bar.sync 1; bra.uni end; red: bar.red.popc.u32 %r1, 1, %p1;",
         "reduction"),
        ("setp.eq.u32 %p1, %r0, 3; @!%p1 bar.sync 0; bar.sync 1;", "deadlock"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 bra low; bar.sync 0; bra.uni end; low: bar.sync 0;", "deadlock"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0, 64;", "deadlock"),
    ],
)  # fmt: skip
def test_barriers_that_are_wrong(body: str, why: str) -> None:
    with pytest.raises(PtxError, match=why):
        run(body, threads=64)
