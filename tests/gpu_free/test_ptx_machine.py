"""In which order the PTX machine runs threads, and what it refuses: small programs written by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ptx_machine import SEEDS, PtxError, instructions, launches, set_seed, set_shared_limit
from ptx_text import module, run


@pytest.fixture(autouse=True, params=SEEDS)
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    set_seed(request.param)
    yield request.param
    set_seed(0)
    set_shared_limit(227 * 1024)


def test_lanes_diverge_and_meet_again() -> None:
    """Each runs a loop of its own length; behind it all exchange values."""
    body = """
        and.b32 %r1, %r0, 7;
        mov.u32 %r2, 0;
        setp.eq.u32 %p1, %r1, 0;
        @%p1 bra done;
    loop:
        setp.gt.u32 %p2, %r1, 4;
        @%p2 bra large;
        add.u32 %r2, %r2, 1;
        bra.uni joined;
    large:
        add.u32 %r2, %r2, 100;
    joined:
        sub.u32 %r1, %r1, 1;
        setp.ne.u32 %p3, %r1, 0;
        @%p3 bra loop;
    done:
        shfl.sync.bfly.b32 %r3|%p4, %r2, 1, 0x1f, 0xffffffff;
        st.global.u32 [%out], %r3;"""
    own = [min(i % 8, 4) + 100 * max(i % 8 - 4, 0) for i in range(32)]
    assert run(body, threads=64) == [own[i ^ 1] for i in range(32)] * 2


def test_lanes_that_are_together_execute_together(seed: int) -> None:
    """In turns, branches cost no more instructions than the longest way through them and the shorter one's own."""
    body = "\n".join(["setp.lt.u32 %p1, %r0, 16;", "@%p1 bra low;"] + ["add.u32 %r1, %r1, 1;"] * 100 + ["low:"]
                     + ["add.u32 %r1, %r1, 1;"] * 1000)  # fmt: skip
    before = instructions()
    run(body)
    assert seed != 0 or instructions() - before < 1120


def test_values_outlive_others_that_come_later_in_the_text() -> None:
    """Registers share storage: not what a loop's next round reads with what is between."""
    body = """
        mov.u32 %r1, 0;
        mov.u32 %r2, 1000;
        mov.u32 %r3, 0;
        mov.u32 %r12, 7;
    loop:
        setp.eq.u32 %p1, %r1, 0;
        @%p1 bra first;
        add.u32 %r3, %r3, %r8;
        add.u32 %r3, %r3, %r2;
    first:
        mul.lo.u32 %r8, %r1, 10;
        setp.eq.u32 %p2, %r1, 2;
        @%p2 add.u32 %r8, %r0, 50;
        @%p2 mov.u32 %r12, 9;
        add.u32 %r3, %r3, %r12;
        mul.lo.u32 %r9, %r1, 7;
        mul.lo.u32 %r10, %r9, 7;
        mul.lo.u32 %r11, %r10, 7;
        st.shared.u32 [0], %r11;
        add.u32 %r1, %r1, 1;
        setp.lt.u32 %p3, %r1, 5;
        @%p3 bra loop;
        st.global.u32 [%out], %r3;"""
    assert run(body, shared=4) == [4000 + 0 + 10 + 50 + i + 30 + 7 + 7 + 9 + 9 + 9 for i in range(32)]


def test_sums_of_wgmma_are_written_until_it_is_waited_for() -> None:
    """Nothing reads them afterwards, and still no value from before the wait may be in their place."""
    body = """
        .reg .f32 %sum<4>;
        mov.b32 %r1, 0;
        shl.b32 %r2, %r0, 4;
        st.shared.v4.b32 [%r2], {%r1, %r1, %r1, %r1};
        fence.proxy.async.shared::cta;
        bar.sync 0;
        mov.b64 %rd1, 0;
        mov.f32 %sum0, 0f3F800000; mov.f32 %sum1, %sum0; mov.f32 %sum2, %sum0; mov.f32 %sum3, %sum0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%sum0, %sum1, %sum2, %sum3}, %rd1, %rd1, 1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        add.u32 %r3, %r0, 1; add.u32 %r4, %r0, 2; add.u32 %r5, %r0, 3; add.u32 %r6, %r0, 4;
        wgmma.wait_group.sync.aligned 0;
        add.u32 %r3, %r3, %r4; add.u32 %r5, %r5, %r6; add.u32 %r3, %r3, %r5;
        st.global.u32 [%out], %r3;"""
    assert run(body, threads=128, shared=2048) == [4 * i + 10 for i in range(128)]


def test_no_lane_writes_what_another_has_yet_to_read() -> None:
    body = """
        mov.b32 %r1, %r0;
        shfl.sync.down.b32 %r2|%p1, %r1, 1, 0x1f, 0xffffffff;
        shfl.sync.up.b32 %r3|%p2, %r2, 2, 0, 0xffffffff;
        shfl.sync.bfly.b32 %r4|%p3, %r3, 3, 0x1f, 0xffffffff;
        st.global.u32 [%out], %r4;"""
    down = [min(i + 1, 31) for i in range(32)]
    up = [down[i - 2 if i > 1 else i] for i in range(32)]
    assert run(body) == [up[i ^ 3] for i in range(32)]


def test_guards() -> None:
    written = run(
        """
        setp.lt.u32 %p1, %r0, 8;
        setp.lt.u32 %p2, %r0, 24;
        mov.u32 %r1, 0;
        @%p1 add.u32 %r1, %r1, 1;
        @!%p1 add.u32 %r1, %r1, 10;
        @%p2 bra $L__inner;
        add.u32 %r1, %r1, 100;
        @!%p2 bra $L__end;
    $L__inner:
        @!%p1 add.u32 %r1, %r1, 1000;
        @%p1 bra $L__end;
        @%p2 exit;
    $L__end:
        st.global.u32 [%out], %r1;""".replace("exit", "add.u32 %r1, %r1, 5000")
    )
    assert written == [1] * 8 + [6010] * 16 + [110] * 8


def test_threads_that_returned_are_not_waited_for() -> None:
    body = """
        setp.ge.u32 %p1, %r0, 40;
        @%p1 ret;
        bar.sync 0;
        st.global.u32 [%out], %r0;"""
    assert run(body, threads=100) == [*range(40), *[-1] * 60]


def test_sums_of_a_block_do_not_depend_on_the_order() -> None:
    """Through shared memory, with barriers, blocks of several warps, more blocks than are resident."""
    body = """
        mov.u32 %r1, values;
        shl.b32 %r2, %r0, 2;
        add.u32 %r3, %r1, %r2;
        st.shared.u32 [%r3], %r0;
        mov.u32 %r4, 128;
    halve:
        bar.sync 0;
        shr.u32 %r4, %r4, 1;
        setp.eq.u32 %p2, %r4, 0;
        @%p2 bra summed;
        setp.ge.u32 %p1, %r0, %r4;
        @%p1 bra halve;
        shl.b32 %r5, %r4, 2;
        add.u32 %r5, %r5, %r3;
        ld.shared.u32 %r6, [%r5];
        ld.shared.u32 %r7, [%r3];
        add.u32 %r7, %r7, %r6;
        st.shared.u32 [%r3], %r7;
        bra.uni halve;
    summed:
        ld.shared.u32 %r8, [values];
        mov.u32 %r9, %ctaid.x;
        add.u32 %r9, %r9, 1;
        mul.lo.u32 %r8, %r8, %r9;
        setp.ne.u32 %p3, %r0, 0;
        @%p3 ret;
        ld.param.u64 %rd1, [out];
        mul.wide.u32 %rd2, %r9, 4;
        add.s64 %rd1, %rd1, %rd2;
        st.global.u32 [%rd1+-4], %r8;"""
    out = run(body, threads=128, blocks=9, before=".shared .align 4 .b8 values[512];")
    assert out == [127 * 64 * (i + 1) for i in range(9)] + [-1] * 119


def test_blocks_of_three_dimensions() -> None:
    body = """
        mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ntid.x; mov.u32 %r4, %ntid.y;
        mad.lo.u32 %r1, %r2, %r4, %r1;
        mad.lo.u32 %r1, %r1, %r3, %r0;
        mov.u32 %r5, %ctaid.x; mov.u32 %r6, %ctaid.y; mov.u32 %r7, %ctaid.z;
        mov.u32 %r8, %nctaid.x; mov.u32 %r9, %nctaid.y;
        mad.lo.u32 %r6, %r9, %r7, %r6;
        mad.lo.u32 %r5, %r6, %r8, %r5;
        mad.lo.u32 %r10, %r5, 30, %r1;
        ld.param.u64 %rd1, [out];
        mul.wide.u32 %rd2, %r10, 4;
        add.s64 %rd1, %rd1, %rd2;
        st.global.u32 [%rd1], %r10;"""
    out = torch.zeros(24 * 30, dtype=torch.int32)
    module(body).launch("k", (2, 3, 4), (5, 3, 2), out)
    assert out.tolist() == list(range(24 * 30))


GRID_BARRIER = """
    mov.u32 %r1, %envreg2; mov.u32 %r2, %envreg1;
    mov.b64 %rd1, {%r1, %r2};
    setp.eq.u64 %p1, %rd1, 0;
    @%p1 trap;
    atom.add.release.gpu.u32 %r3, [%rd1+4], 1;
    mov.u32 %r4, %nctaid.x;
    mul.lo.u32 %r4, %r4, 32;
spin:
    ld.acquire.gpu.u32 %r5, [%rd1+4];
    setp.lt.u32 %p2, %r5, %r4;
    @%p2 bra spin;
    st.global.u32 [%out], %r5;"""


def test_all_blocks_of_a_cooperative_grid_are_resident() -> None:
    assert run(GRID_BARRIER, blocks=40, cooperative=True) == [40 * 32] * 32


def test_other_grids_have_no_workspace() -> None:
    with pytest.raises(PtxError, match="trap"):
        run(GRID_BARRIER)


def test_a_lane_that_spins_does_not_starve_its_warp() -> None:
    body = """
        mov.u32 %r1, 0;
        setp.ne.u32 %p1, %r0, 0;
        @%p1 bra set;
    spin:
        ld.volatile.shared.u32 %r1, [flag];
        setp.ne.u32 %p2, %r1, 7;
        @%p2 bra spin;
        bra.uni end;
    set:
        mov.u32 %r1, 7;
        st.volatile.shared.u32 [flag], %r1;
    end:
        st.global.u32 [%out], %r1;"""
    assert run(body, before=".shared .align 4 .u32 flag;") == [7] * 32


def test_deadlock_says_who_waits_where() -> None:
    body = """
        setp.lt.u32 %p1, %r0, 32;
        @%p1 bra two;
        bar.sync 1, 64;
        bra.uni end;
    two:
        bar.sync 2, 64;
    end:
        mov.u32 %r1, 0;"""
    with pytest.raises(PtxError) as error:
        run(body, threads=64)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("deadlock of kernel k")
    assert sorted(line.split(", warp ")[1].split(" at line ")[0] for line in lines[1:]) == [
        "0, lanes ffffffff are",
        "1, lanes ffffffff are",
    ]
    assert {line.split(": ")[1] for line in lines[1:]} == {"bar.sync 1, 64", "bar.sync 2, 64"}


@pytest.mark.parametrize("seed", SEEDS[:2], indirect=True)
def test_spinning_for_ever_is_a_deadlock() -> None:
    body = "spin: ld.volatile.shared.u32 %r1, [0]; setp.ne.u32 %p1, %r1, 7; @%p1 bra spin;"
    with pytest.raises(PtxError, match=r"deadlock.*\n  block \(0,0,0\), warp 0, lanes 00000001 are at line \d+: "):
        run(body, threads=1, shared=4)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("[%r1+2]", "82 is not aligned to 4"),
        ("[%r1+48]", "4 bytes at 128 are not in the block's 128 bytes of shared memory"),
        ("[%r1+-84]", "4294967292 are not in"),
    ],
)
def test_wrong_addresses_of_shared_memory_name_the_thread(address: str, why: str) -> None:
    body = f"""
        mul.lo.u32 %r1, %r0, 8; setp.ne.u32 %p1, %r0, 10; mov.u32 %r2, 3;
        @%p1 ret;
        ld.shared.u32 %r1, {address};"""
    with pytest.raises(PtxError, match=r'kernel k, line 2\d "ld.shared.*, block \(0,0,0\), thread \(10,0,0\)') as error:
        run(body, shared=128)
    assert why in str(error.value)


def test_launches_that_a_gpu_refuses() -> None:
    out = torch.zeros(2048, dtype=torch.int32)
    before = launches()
    bounded = module("", directives=".maxntid 64, 2, 1")
    bounded.launch("k", 1, (32, 4), out)
    exact = module("", directives=".reqntid 64")
    exact.launch("k", 1, 64, out)
    assert launches() == before + 2
    for of, grid, block, shared, why in (
        (bounded, 1, 256, 0, "at most 128"),
        (bounded, 1, 0, 0, "threads"),
        (bounded, (1, 0, 1), 32, 0, "blocks"),
        (bounded, (1, 65536), 32, 0, "blocks"),
        (exact, 1, 32, 0, "reqntid"),
        (module(""), 1, (64, 32), 0, "at most 1024"),
        (module(""), 1, 32, 227 * 1024 + 1, "shared memory"),
    ):
        with pytest.raises(PtxError, match=why):
            of.launch("k", grid, block, out, shared=shared)
    set_shared_limit(1024)
    with pytest.raises(PtxError, match="1028 bytes of shared memory, of at most 1024"):
        module("").launch("k", 1, 32, out, shared=1028)
    assert launches() == before + 2
