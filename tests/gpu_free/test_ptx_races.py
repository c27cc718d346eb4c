"""Races for shared memory on the PTX machine: programs with one, and the same ones with what orders them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from ptx_machine import SEEDS, Module, PtxError, set_races, set_seed


@pytest.fixture(autouse=True)
def looked_for() -> Iterator[None]:
    set_races(True)
    yield
    set_races(False)
    set_seed(0)


@dataclass(frozen=True)
class Program:
    """A body that is right, and what must not be taken from it: patterns, each with what to put instead."""

    body: str
    defects: tuple[tuple[str, str], ...]
    threads: int = 64


# Thread t has the word at %r3, its neighbours those at %r4 (in the same warp) and %r5 (in the other one); %r6 and %r7
# have 16 bytes each. %p0 holds for thread 0, %p1 for warp 0.
PLACES = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r2, bytes;
    mad.lo.u32 %r3, %r0, 4, %r2;
    xor.b32 %r4, %r0, 5; mad.lo.u32 %r4, %r4, 4, %r2;
    xor.b32 %r5, %r0, 32; mad.lo.u32 %r5, %r5, 4, %r2;
    mad.lo.u32 %r6, %r0, 16, %r2;
    xor.b32 %r7, %r0, 1; mad.lo.u32 %r7, %r7, 16, %r2;
    mad.wide.u32 %rd2, %r0, 16, %in;
    setp.eq.u32 %p0, %r0, 0;
    setp.lt.u32 %p1, %r0, 32;
"""
# A wait and its loop. What is left of a wait without its loop is right in those orders in which it happens to succeed.
WAIT = r"again:\s+mbarrier.\w+_wait[^;]*; @!%p2 bra again;"
PROGRAMS = {
    "bar.sync": Program(
        "st.shared.b32 [%r3], %r0; bar.sync 0; ld.shared.b32 %r8, [%r5]; bar.sync 0; st.shared.b32 [%r3], 7;",
        (("bar.sync 0; ld", "ld"), ("bar.sync 0; st", "st")),
    ),
    "named barriers": Program(
        """
        @%p1 bra producer;
        bar.sync 1, 64; ld.shared.b32 %r8, [%r5]; bra end;
    producer:
        st.shared.b32 [%r3], %r0; bar.arrive 1, 64; bra end;
    end:
        """,
        (
            (r"st.shared.b32 \[%r3\], %r0; bar.arrive 1, 64;", "bar.arrive 1, 64; st.shared.b32 [%r3], %r0;"),
            (r"bar.sync 1, 64; ld.shared.b32 %r8, \[%r5\];", "ld.shared.b32 %r8, [%r5]; bar.sync 1, 64;"),
        ),
    ),
    "reduction": Program(
        "st.shared.b32 [%r3], %r0; barrier.red.popc.u32 %r9, 0, %p1; ld.shared.b32 %r8, [%r5];",
        (("barrier.red.popc.u32 %r9, 0, %p1;", ""),),
    ),
    "bar.warp.sync": Program(
        "st.shared.b32 [%r3], %r0; bar.warp.sync 0xffffffff; ld.shared.b32 %r8, [%r4];",
        (
            ("bar.warp.sync 0xffffffff;", ""),
            ("bar.warp.sync 0xffffffff;", "shfl.sync.idx.b32 %r9, %r0, 0, 0x1f, 0xffffffff;"),
            (r"\[%r4\]", "[%r5]"),
        ),
    ),
    "half a warp": Program(
        """
        and.b32 %r9, %r0, 4; setp.ne.u32 %p2, %r9, 0; mov.u32 %r9, 0x0f0f0f0f; @%p2 mov.u32 %r9, 0xf0f0f0f0;
        xor.b32 %r4, %r0, 8; mad.lo.u32 %r4, %r4, 4, %r2;
        st.shared.b32 [%r3], %r0; bar.warp.sync %r9; ld.shared.b32 %r8, [%r4];
        """,
        (("%r0, 8; mad", "%r0, 4; mad"),),
    ),
    "writes": Program(
        "@%p0 st.shared.b32 [%r2], 1; bar.sync 0; "
        "@!%p1 st.shared.b32 [%r2], 1; bar.sync 0; @%p0 st.shared.b32 [%r2], 2;",
        (("bar.sync 0; @%p0", "@%p0"),),
    ),
    "bytes": Program(
        "add.u32 %r9, %r2, %r0; st.shared.b8 [%r9], %r0; bar.sync 0; "
        "@%p0 ld.shared.v4.b32 {%r8, %r9, %r10, %r11}, [%r2];",
        (("bar.sync 0;", ""), (r"st.shared.b8 \[%r9\]", "and.b32 %r9, %r9, 0xffe; st.shared.b16 [%r9]")),
    ),
    "ldmatrix": Program(
        """
        st.shared.v4.b32 [%r6], {%r0, %r0, %r0, %r0}; bar.warp.sync 0xffffffff;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r8, %r9, %r10, %r11}, [%r7]; bar.warp.sync 0xffffffff;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r6], {%r8, %r9, %r10, %r11}; bar.warp.sync 0xffffffff;
        ld.shared.b32 %r8, [%r7];
        """,
        tuple((f"bar.warp.sync 0xffffffff;\n +{what}", what) for what in ("ldm", "stm", "ld.sh")),
    ),
    "atomics": Program(
        "@%p0 st.shared.b32 [%r2], 0; bar.sync 0; "
        "atom.shared.add.u32 %r8, [%r2], 1; bar.sync 0; ld.shared.b32 %r8, [%r2];",
        (("bar.sync 0; atom", "atom"), ("bar.sync 0; ld", "ld"), (r"atom[^;]*;", "st.shared.b32 [%r2], %r0;")),
    ),
    "flag": Program(
        """
        @!%p1 bra reader;
        st.shared.b32 [%r3], %r0; bar.warp.sync 0xffffffff;
        @%p0 st.release.cta.shared.b32 [%r2+1024], 1;
        bra end;
    reader:
        ld.acquire.cta.shared.b32 %r8, [%r2+1024]; setp.ne.u32 %p2, %r8, 1; @%p2 bra reader;
        ld.shared.b32 %r8, [%r5];
    end:
        """,
        (("acquire", "relaxed"), ("release", "relaxed"), ("bar.warp.sync 0xffffffff;", "")),
    ),
    "flag and fences": Program(
        """
        @!%p1 bra reader;
        @%p0 st.shared.b32 [%r3], %r0; @%p0 fence.acq_rel.cta; @%p0 st.volatile.shared.b32 [%r2+1024], 1;
        bra end;
    reader:
        ld.volatile.shared.b32 %r8, [%r2+1024]; setp.ne.u32 %p2, %r8, 1; @%p2 bra reader;
        membar.cta; ld.shared.b32 %r8, [%r2];
    end:
        """,
        (("membar.cta;", ""), ("@%p0 fence.acq_rel.cta;", ""), ("st.volatile", "st")),
    ),
    "cp.async": Program(
        """
        cp.async.cg.shared.global [%r6], [%rd2], 16; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.b32 %r8, [%r6]; bar.sync 0; ld.shared.b32 %r8, [%r7];
        """,
        (
            ("cp.async.wait_group 0;", ""),
            ("cp.async.wait_group 0;", "cp.async.wait_group 1;"),
            ("cp.async.commit_group;", ""),
            ("bar.sync 0;", ""),
            ("cp.async.wait_group 0;([^;]*;) bar.sync 0;", "bar.sync 0; cp.async.wait_group 0;"),
        ),
    ),
    "groups of cp.async": Program(
        """
        cp.async.ca.shared.global [%r6], [%rd2], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r6+4], [%rd2], 4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.b32 %r8, [%r6]; cp.async.ca.shared.global [%r6], [%rd2], 4;
        cp.async.wait_all; st.shared.b32 [%r6+4], 7; st.shared.b32 [%r6], 7;
        """,
        (
            (r"ld.shared.b32 %r8, \[%r6\]", "ld.shared.b32 %r8, [%r6+4]"),
            ("cp.async.wait_all", "cp.async.wait_group 0"),
            (r"\[%r6\+4\], \[%rd2\]", "[%r6], [%rd2]"),
        ),
    ),
    "cp.async and mbarrier": Program(
        """
        @%p0 mbarrier.init.shared.b64 [%r2+2048], 64; bar.sync 0;
        cp.async.cg.shared.global [%r6], [%rd2], 16;
        cp.async.mbarrier.arrive.noinc.shared.b64 [%r2+2048];
    again:
        mbarrier.test_wait.parity.shared.b64 %p2, [%r2+2048], 0; @!%p2 bra again;
        ld.shared.b32 %r8, [%r7];
        """,
        (("bar.sync 0;", ""), (WAIT, ""), ("cp.async.mb.*noinc.shared.b64", "mbarrier.arrive.shared.b64 _,"),
         (r"(cp.async.cg[^;]*;)\s*(cp.async.mbar[^;]*;)", r"\2 \1")),
    ),
    "mbarrier": Program(
        """
        @%p0 mbarrier.init.shared.b64 [%r2+2048], 64; bar.sync 0;
        st.shared.b32 [%r3], %r0; mbarrier.arrive.shared.b64 %rd3, [%r2+2048];
    again:
        mbarrier.try_wait.shared.b64 %p2, [%r2+2048], %rd3; @!%p2 bra again;
        ld.shared.b32 %r8, [%r5];
        """,
        (("bar.sync 0;", ""), (r"(st.shared[^;]*;) (mb[^;]*;)", r"\2 \1"), (WAIT, "")),
    ),
    "cluster": Program(
        """
        st.shared.b32 [%r3], %r0; barrier.cluster.arrive.release.aligned;
        barrier.cluster.wait.acquire.aligned; ld.shared.b32 %r8, [%r5];
        """,
        (("arrive.release", "arrive.relaxed"), (r"(barrier.cluster.wait[^;]*;)([^;]*;)", r"\2 \1")),
    ),
    "bulk copy": Program(
        """
        setp.eq.u32 %p3, %r0, 32;
        @%p0 mbarrier.init.shared.b64 [%r2+2048], 1; @%p0 fence.mbarrier_init.release.cluster;
        ld.shared.b32 %r8, [%r3]; bar.sync 0;
        @%p3 mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2+2048], 256;
        @%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%in], 256, [%r2+2048];
        @!%p1 bra end;
    again:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2+2048], 0; @!%p2 bra again;
        ld.shared.b32 %r8, [%r5];
    end:
        """,
        (("ld.shared.b32 %r8, ..r3.; bar.sync 0;", "bar.sync 0; ld.shared.b32 %r8, [%r3];"), (WAIT, ""),
         ("@!%p1 bra end;", "@!%p1 st.shared.b32 [%r3], 7; @!%p1 bra end;")),
    ),
    "stage": Program(
        """
        @%p0 mbarrier.init.shared.b64 [%r2+2048], 1; @%p0 mbarrier.init.shared.b64 [%r2+2056], 32;
        @%p0 fence.mbarrier_init.release.cluster; bar.sync 0;
        mov.u32 %r9, 0;
        @!%p1 bra consume;
        @!%p0 bra end;
    produce:
        setp.eq.u32 %p3, %r9, 0; @%p3 bra fill;
        sub.u32 %r10, %r9, 1; and.b32 %r10, %r10, 1;
    empty:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2+2056], %r10; @!%p2 bra empty;
    fill:
        mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2+2048], 128;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%in], 128, [%r2+2048];
        add.u32 %r9, %r9, 1; setp.lt.u32 %p3, %r9, 3; @%p3 bra produce;
        bra end;
    consume:
        and.b32 %r10, %r9, 1;
    full:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2+2048], %r10; @!%p2 bra full;
        ld.shared.b32 %r8, [%r5]; mbarrier.arrive.shared.b64 %rd3, [%r2+2056];
        add.u32 %r9, %r9, 1; setp.lt.u32 %p3, %r9, 3; @%p3 bra consume;
    end:
        """,
        # The stage is freed too early.
        ((r"(ld.shared.b32 %r8, ..r5.;) (mb[^;]*;)", r"\2 \1"),),
    ),
    "one frees for its warp": Program(
        """
        @%p0 mbarrier.init.shared.b64 [%r2+2048], 1; bar.sync 0;
        @!%p1 bra other;
        ld.shared.b32 %r8, [%r3]; bar.warp.sync 0xffffffff;
        @%p0 mbarrier.arrive.shared.b64 %rd3, [%r2+2048];
        bra end;
    other:
    again:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2+2048], 0; @!%p2 bra again;
        st.shared.b32 [%r5], 7;
    end:
        """,
        (("bar.warp.sync 0xffffffff;", ""), (WAIT, "")),
    ),
    "bulk store": Program(
        """
        st.shared.b32 [%r3], %r0; fence.proxy.async.shared::cta; bar.sync 0;
        @!%p0 bra end;
        cp.async.bulk.global.shared::cta.bulk_group [%out], [%r2], 128; cp.async.bulk.commit_group;
        ld.shared.b32 %r8, [%r2];
        cp.async.bulk.wait_group.read 0; st.shared.b32 [%r2], 77;
    end:
        """,
        (("cp.async.bulk.wait_group.read 0;", ""), ("cp.async.bulk.commit_group;", ""), ("bar.sync 0;", "")),
    ),
    "wgmma": Program(
        """
        mov.b32 %r8, 0; mov.b64 %rd3, 0;
        st.shared.v4.b32 [%r6], {%r8, %r8, %r8, %r8}; fence.proxy.async.shared::cta; bar.sync 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %rd3, %rd3, 1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;
        st.shared.b32 [%r3+2048], %r0; ld.shared.b32 %r8, [%r3];
        wgmma.wait_group.sync.aligned 0; bar.sync 0; st.shared.b32 [%r3], 7;
        """,
        (
            ("bar.sync 0;", ""),
            ("bar.sync 0; st", "st"),
            ("wgmma.wait_group.sync.aligned 0;([^;]*;)([^;]*;)", r"\1 \2 wgmma.wait_group.sync.aligned 0;"),
            ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
            ("wgmma.commit_group.sync.aligned;", ""),
        ),
        threads=128,
    ),
}  # fmt: skip


def launch(body: str, threads: int, seed: int) -> None:
    set_seed(seed)
    Module(f"""
        .version 8.6
        .target sm_90a
        .address_size 64
        .visible .entry k(.param .u64 in, .param .u64 out)
        {{
            .reg .pred %p<8>; .reg .b32 %r<16>; .reg .b64 %rd<16>, %in, %out; .reg .f32 %f<8>;
            .shared .align 128 .b8 bytes[4096];
            ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
            {PLACES}
            {body}
            ret;
        }}
    """).launch("k", 1, threads, torch.arange(1024, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32))


@pytest.mark.parametrize("name", PROGRAMS)
def test_ordered_accesses_are_no_race(name: str) -> None:
    for seed in SEEDS:
        launch(PROGRAMS[name].body, PROGRAMS[name].threads, seed)


@pytest.mark.parametrize(("name", "which"), [(n, k) for n, p in PROGRAMS.items() for k in range(len(p.defects))])
def test_races_are_found_in_every_order(name: str, which: int) -> None:
    pattern, replacement = PROGRAMS[name].defects[which]
    body, count = re.subn(pattern, replacement, PROGRAMS[name].body, count=1)
    assert count == 1
    for seed in SEEDS:
        # Or what else is wrong about it: in some orders that comes first.
        with pytest.raises(PtxError, match=r"a race: this|no mbarrier was initialised|no fence.proxy.async since"):
            launch(body, PROGRAMS[name].threads, seed)


def test_the_error_names_both_sides() -> None:
    one = r'line \d+ "st.shared.b32 \[%r3\], %r0"'
    other = r'line \d+ "ld.shared.b32 %r8, \[%r5\]"'
    found = set()
    for seed in SEEDS:
        with pytest.raises(PtxError) as error:
            launch("st.shared.b32 [%r3], %r0; ld.shared.b32 %r8, [%r5];", 64, seed)
        text = str(error.value)
        for first, second, what in ((one, other, ("write", "read")), (other, one, ("read", "write"))):
            match = re.fullmatch(
                rf"kernel k, {first}, block \(0,0,0\), thread \((\d+),0,0\): a race: this {what[0]} of shared offset "
                rf"(\d+) and a {what[1]} by {second}, thread \((\d+),0,0\): nothing orders them",
                text,
            )
            if match:
                place = int(match[2]) // 4
                writer, reader = (match[1], match[3]) if what[0] == "write" else (match[3], match[1])
                assert (int(writer), int(reader)) == (place, place ^ 32)
                found.add(what[0])
                break
        else:
            pytest.fail(text)
    assert found


@pytest.mark.parametrize(
    ("body", "who"),
    [
        ("cp.async.cg.shared.global [%r6], [%rd2], 16; ld.shared.b32 %r8, [%r6];", r"copies of thread \(0,0,0\)"),
        (PROGRAMS["wgmma"].body.replace("wgmma.wait_group.sync.aligned 0;", ""), r"matrix products of warp \d"),
        (
            """
            @!%p0 bra end;
            mbarrier.init.shared.b64 [%r2+2048], 1; fence.mbarrier_init.release.cluster;
            mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r2+2048], 256;
            cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%in], 256, [%r2+2048];
            ld.shared.b32 %r8, [%r2];
        end:
            """,
            "bulk copies on the mbarrier at shared offset 2048",
        ),
    ],
)
def test_the_error_names_asynchronous_work(body: str, who: str) -> None:
    with pytest.raises(PtxError, match=rf"{who}: nothing orders them"):
        launch(body, 128, 0)


def test_equal_values_are_no_race() -> None:
    for seed in SEEDS:
        launch("mov.u32 %r8, 7; st.shared.b32 [%r2], %r8;", 64, seed)
        with pytest.raises(PtxError, match="a race"):
            launch("mov.u32 %r8, 7; st.shared.b32 [%r2], %r8; @%p0 ld.shared.b32 %r8, [%r2];", 64, seed)


def test_nothing_is_looked_for_unless_asked() -> None:
    set_races(False)
    launch("st.shared.b32 [%r3], %r0; ld.shared.b32 %r8, [%r5];", 64, 0)
