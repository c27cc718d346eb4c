"""Races for global memory between blocks on the PTX machine: programs with one, the same ones with what orders them."""

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
    """A body that is right, and what must not be done to it: patterns, each with what to put instead."""

    body: str
    defects: tuple[tuple[str, str], ...]
    blocks: int = 5
    cooperative: bool = False


# Of 64 words at %out, one to a thread of the block at %rd4; %rd5 is that of its neighbour in the next block. Behind
# them all, words at %rd6 are for everybody. %p0 holds for thread 0, %p1 for block 0.
PLACES = """
    mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %nctaid.x;
    mad.lo.u32 %r3, %r1, 64, %r0; mad.wide.u32 %rd4, %r3, 4, %out;
    add.u32 %r4, %r1, 1; rem.u32 %r4, %r4, %r2; mad.lo.u32 %r4, %r4, 64, %r0; mad.wide.u32 %rd5, %r4, 4, %out;
    mul.lo.u32 %r5, %r2, 64; mad.wide.u32 %rd6, %r5, 4, %out;
    sub.u32 %r6, %r2, 1;
    setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r1, 0;
"""
# As nvcc has them: __threadfence() and atomicAdd() around a counter, by the last block; and this_grid().sync().
LAST_BLOCK = """
    st.global.u32 [%rd4], %r3; bar.sync 0;
    setp.ne.u32 %p2, %r0, %r0;
    @!%p0 bra counted;
    membar.gl; atom.global.add.u32 %r8, [%rd6], 1; membar.gl; setp.eq.u32 %p2, %r8, %r6;
counted:
    barrier.red.or.pred %p2, 0, %p2; @!%p2 bra end;
    ld.volatile.global.u32 %r10, [%rd5]; ld.global.u32 %r10, [%rd5];
end:
"""
GRID_BARRIER = """
    mov.u32 %r8, %envreg2; mov.u32 %r9, %envreg1; mov.b64 %rd7, {%r8, %r9};
    mov.u32 %r9, 1; @%p1 sub.u32 %r9, 0x80000001, %r2;
    st.global.u32 [%rd4], %r3;
    barrier.sync 0;
    @!%p0 bra met;
    atom.add.release.gpu.u32 %r10, [%rd7+4], %r9;
again:
    ld.acquire.gpu.u32 %r11, [%rd7+4]; xor.b32 %r11, %r11, %r10; setp.gt.s32 %p2, %r11, -1; @%p2 bra again;
met:
    barrier.sync 0;
    ld.global.u32 %r12, [%rd5];
"""
# Thread 0 of block 0 is waited for by the others'.
FLAG = """
    @!%p0 bra end;
    @!%p1 bra again;
    st.global.u32 [%rd6], 7; {release} bra end;
again:
    {acquire} setp.ne.u32 %p2, %r8, 1; @%p2 bra again;
    {after} ld.global.u32 %r8, [%rd6];
end:
"""
PROGRAMS = {
    "last block": Program(
        LAST_BLOCK,
        (
            ("membar.gl; atom", "atom"),
            ("1; membar.gl;", "1;"),
            ("membar.gl; atom", "membar.cta; atom"),
            ("1; membar.gl;", "1; membar.cta;"),
            ("1; membar.gl;", "1; fence.acq_rel.cta;"),
            ("atom.global", "atom.cta.global"),
            ("atom.global.add.u32 %r8, [^;]*;", "ld.global.u32 %r8, [%rd6]; add.u32 %r9, %r8, 1; "
             "st.global.u32 [%rd6], %r9;"),
            ("bar.sync 0;", ""),
            (r"barrier.red.or.pred %p2, 0, %p2; @!%p2 bra end;\n(.*)", r"\1 barrier.red.or.pred %p2, 0, %p2;"),
        ),
    ),
    "grid barrier": Program(
        GRID_BARRIER,
        (
            ("release", "relaxed"),
            ("acquire", "relaxed"),
            ("release.gpu", "release.cta"),
            ("acquire.gpu", "acquire.cluster"),
            (r"(st.global[^;]*;)\s*(barrier.sync 0;)", r"\2 \1"),
            (r"(barrier.sync 0;)\s*(ld.global[^;]*;)", r"\2 \1"),
            (r"again:[^@]*@%p2 bra again;", ""),
            (r"(?s)barrier.sync 0;.*met:", ""),
        ),
        cooperative=True,
    ),
    "release and acquire": Program(
        FLAG.format(release="st.release.gpu.global.u32 [%rd6+4], 1;",
                    acquire="ld.acquire.sys.global.u32 %r8, [%rd6+4];", after=""),
        (("release.gpu", "relaxed.gpu"), ("acquire.sys", "relaxed.sys"), ("release.gpu", "release.cta"),
         ("acquire.sys", "acquire.cta"), ("st.release.gpu", "st"), ("ld.acquire.sys", "ld"),
         (r"(st.global.u32 ..rd6., 7;) (st[^;]*;)", r"\2 \1")),
        cooperative=True,
    ),
    "fences and a volatile flag": Program(
        FLAG.format(release="fence.acq_rel.gpu; st.volatile.global.u32 [%rd6+4], 1;",
                    acquire="ld.volatile.global.u32 %r8, [%rd6+4];", after="fence.sc.gpu;"),
        (("fence.acq_rel.gpu;", ""), ("fence.sc.gpu;", ""), ("acq_rel.gpu", "acq_rel.cta"), ("sc.gpu", "sc.cluster"),
         ("st.volatile", "st"), ("ld.volatile", "ld"), ("st.volatile", "st.relaxed.cta"),
         (r"fence.acq_rel.gpu; (st[^;]*;)", r"\1 fence.acq_rel.gpu;")),
        cooperative=True,
    ),
    # Block 0 to 1, 1 to 2, ...: each by a word of its own, and the last reads what the first wrote.
    "chain": Program(
        """
        @!%p0 bra end;
        mad.wide.u32 %rd7, %r1, 4, %rd6;
        @!%p1 bra again;
        st.global.u32 [%rd6], 7; bra pass;
    again:
        ld.acquire.gpu.u32 %r8, [%rd7]; setp.eq.u32 %p2, %r8, 0; @%p2 bra again;
    pass:
        setp.eq.u32 %p2, %r1, %r6; @%p2 bra last;
        st.release.gpu.u32 [%rd7+4], 1; bra end;
    last:
        ld.global.u32 %r8, [%rd6];
    end:
        """,
        (("release", "relaxed"), ("acquire.gpu", "acquire.cta"), ("acquire", "relaxed")),
        cooperative=True,
    ),
    # A store of another thread's ends what atomics would go on with.
    "atomics in a row": Program(
        """
        @!%p0 bra end;
        setp.eq.u32 %p2, %r1, %r6;
        @!%p1 bra other;
        st.global.u32 [%rd6+4], 7; st.release.gpu.u32 [%rd6], 1; bra end;
    other:
        ld.relaxed.gpu.u32 %r8, [%rd6]; setp.ne.u32 %p3, %r8, %r1; @%p3 bra other;
        @!%p2 atom.relaxed.gpu.add.u32 %r8, [%rd6], 1;
        @!%p2 bra end;
        ld.acquire.gpu.u32 %r8, [%rd6]; ld.global.u32 %r8, [%rd6+4];
    end:
        """,
        ((r"@!%p2 atom.relaxed.gpu.add.u32 %r8, \[%rd6\], 1;",
          "add.u32 %r8, %r1, 1; @!%p2 st.relaxed.gpu.u32 [%rd6], %r8;"),),
        blocks=3, cooperative=True,
    ),
    "what everybody reads": Program(
        "ld.global.u32 %r8, [%rd6]; ld.volatile.global.u32 %r8, [%rd6]; "
        "ld.global.v4.u32 {%r8, %r9, %r10, %r11}, [%rd6];",
        (("ld.volatile.global.u32 %r8, [^;]*;", "@%p1 st.global.u32 [%rd6], 0;"),
         (r"ld.global.u32 %r8, \[%rd6\];", "@%p1 st.global.u32 [%rd6+12], 0;"),
         ("ld.volatile.global.u32 %r8, [^;]*;", "@%p1 st.volatile.global.u32 [%rd6], 0;")),
    ),
    "counters": Program(
        "atom.global.add.u32 %r8, [%rd6], 1; red.global.max.s32 [%rd6], %r3; ld.volatile.global.u32 %r8, [%rd6];",
        (("atom.global.add.u32 %r8, [^;]*;", "ld.global.u32 %r8, [%rd6];"), ("red.global", "red.cta.global"),
         ("red.global.max.s32", "st.global.u32"), ("ld.volatile.global.u32 %r8", "ld.volatile.global.u16 %h0")),
    ),
    "bytes of a word": Program(
        "cvt.u64.u32 %rd7, %r1; add.s64 %rd7, %rd7, %rd6; @%p0 st.global.u8 [%rd7], %r1;",
        (("%r1; add", "%r0; add"), ("cvt.u64.u32 %rd7, %r1;", "cvt.u64.u32 %rd7, %r6;"),
         ("@%p0 st", "@%p1 ld.global.u32 %r8, [%rd6]; @%p0 st")),
        blocks=4,
    ),
    "halves of a word": Program(
        "mad.wide.u32 %rd7, %r1, 2, %rd6; @%p0 st.global.u16 [%rd7], %h0; @%p0 ld.global.u16 %h0, [%rd7];",
        ((r"ld.global.u16 %h0, \[%rd7\]", "ld.global.u16 %h0, [%rd6]"),
         ("st.global.u16 ..rd7., %h0", "st.global.u32 [%rd6], %r1")),
        blocks=2,
    ),
    "copies": Program(
        "shl.b32 %r8, %r0, 4; add.u32 %r8, %r8, %r7; mad.wide.u32 %rd7, %r0, 16, %rd6; "
        "cp.async.cg.shared.global [%r8], [%rd7], 16, 4; cp.async.wait_all; @%p1 ld.global.u32 %r9, [%rd7+4];",
        (("ld.global.u32 %r9", "st.global.u32 [%rd7], %r9; ld.global.u32 %r9"), ("@%p1 ld.global.u32 %r9, [^;]*",
         "@%p1 st.global.u32 [%rd7], %r9"), ("cp.async.wait_all; @%p1 ld.global.u32 %r9, [^;]*",
         "@%p1 red.global.add.u32 [%rd7], %r9")),
    ),
    "bulk copies": Program(
        """
        @!%p0 bra end;
        mad.wide.u32 %rd7, %r1, 64, %rd6;
        mbarrier.init.shared.b64 [%r7+2048], 1; fence.mbarrier_init.release.cluster;
        mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r7+2048], 64;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r7], [%rd6+640], 64, [%r7+2048];
    again:
        mbarrier.try_wait.parity.shared.b64 %p2, [%r7+2048], 0; @!%p2 bra again;
        cp.async.bulk.global.shared::cta.bulk_group [%rd7], [%r7], 64; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0;
    end:
        """,
        ((r"\[%rd6\+640\]", "[%rd6+64]"), ("%r1, 64", "%r1, 48")),
    ),
    # Who writes has waited for the copies of who reads.
    "reused after copies": Program(
        FLAG.format(
            release="cp.async.ca.shared.global [%r7], [%rd6+8], 4; cp.async.wait_all; st.release.gpu.u32 [%rd6+4], 1;",
            acquire="ld.acquire.gpu.u32 %r8, [%rd6+4];",
            after="setp.eq.u32 %p2, %r1, 1; @%p2 st.global.u32 [%rd6+8], 0;"),
        ((r"cp.async.wait_all; ([^;]*;)", r"\1 cp.async.wait_all;"), ("cp.async.wait_all;", "")),
        cooperative=True,
    ),
    "reused after bulk copies": Program(
        FLAG.format(
            release="cp.async.bulk.global.shared::cta.bulk_group [%rd6+64], [%r7], 64; cp.async.bulk.commit_group; "
                    "cp.async.bulk.wait_group 0; st.release.gpu.u32 [%rd6+4], 1;",
            acquire="ld.acquire.gpu.u32 %r8, [%rd6+4];",
            after="ld.global.u32 %r8, [%rd6+124];"),
        (("wait_group 0", "wait_group.read 0"), ("cp.async.bulk.wait_group 0;", ""),
         ("cp.async.bulk.commit_group;", "")),
        cooperative=True,
    ),
}  # fmt: skip


def launch(program: Program, body: str, seed: int) -> None:
    set_seed(seed)
    Module(f"""
        .version 8.6
        .target sm_90a
        .address_size 64
        .visible .entry k(.param .u64 out)
        {{
            .reg .pred %p<8>; .reg .b32 %r<16>; .reg .b64 %rd<16>, %out; .reg .b16 %h<2>;
            .shared .align 128 .b8 bytes[4096];
            ld.param.u64 %out, [out]; mov.u32 %r7, bytes; mov.b16 %h0, 0;
            {PLACES}
            {body}
            ret;
        }}
    """).launch("k", program.blocks, 64, torch.zeros(2048, dtype=torch.int32), cooperative=program.cooperative)


@pytest.mark.parametrize("name", PROGRAMS)
def test_ordered_accesses_are_no_race(name: str) -> None:
    for seed in SEEDS:
        launch(PROGRAMS[name], PROGRAMS[name].body, seed)


@pytest.mark.parametrize(("name", "which"), [(n, k) for n, p in PROGRAMS.items() for k in range(len(p.defects))])
def test_races_are_found_in_every_order(name: str, which: int) -> None:
    pattern, replacement = PROGRAMS[name].defects[which]
    body, count = re.subn(pattern, replacement, PROGRAMS[name].body, count=1)
    assert count == 1
    for seed in SEEDS:
        with pytest.raises(PtxError, match="a race: this"):
            launch(PROGRAMS[name], body, seed)


def test_the_error_names_both_sides() -> None:
    body = "@!%p1 ld.global.u32 %r8, [%rd6]; @%p1 st.global.u32 [%rd6], %r8;"
    found = set()
    for seed in SEEDS:
        with pytest.raises(PtxError) as error:
            launch(Program(body, (), blocks=2), body, seed)
        side = r'line \d+ "@!?%p1 (ld|st)\.global[^"]*", block (\S+), thread \((\d+),0,0\)'
        what = r"a race: this (\w+) of global memory at 0x\w+ and a (\w+) by"
        text = rf"kernel k, {side}: {what} {side}: nothing orders them"
        match = re.fullmatch(text, str(error.value))
        assert match, str(error.value)
        op, block, _, this, that, other, other_block, _ = match.groups()
        names = {"ld": ("read", "(1,0,0)"), "st": ("write", "(0,0,0)")}
        assert (this, block) == names[op]
        assert (that, other_block) == names[other]
        found.add(this)
    assert found


def test_equal_values_are_a_race_between_blocks_alone() -> None:
    body = "st.global.u32 [%rd6], 7;"
    for seed in SEEDS:
        launch(Program(body, (), blocks=1), body, seed)
        with pytest.raises(PtxError, match="a race: this write"):
            launch(Program(body, ()), body, seed)


def test_a_launch_comes_after_those_before_it() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    store = "mov.u32 %r0, %ctaid.x; setp.eq.u32 %p0, %r0, {block}; @%p0 st.global.u32 [%out], %r0;"
    for block in (0, 1):
        Module(f"""
            .version 8.6
            .target sm_90a
            .address_size 64
            .visible .entry k(.param .u64 out)
            {{
                .reg .pred %p<2>; .reg .b32 %r<2>; .reg .b64 %out; ld.param.u64 %out, [out];
                {store.format(block=block)} ret;
            }}
        """).launch("k", 2, 1, out)
    assert out[0] == 1


def test_local_memory_and_parameters_are_nobody_elses() -> None:
    body = ".local .align 4 .b8 stack[16]; st.local.u32 [stack], %r1; ld.local.u32 %r8, [stack];"
    launch(Program(body, (), blocks=20), body, 0)


def test_nothing_is_looked_for_unless_asked() -> None:
    set_races(False)
    body = "st.global.u32 [%rd6], %r1;"
    launch(Program(body, ()), body, 0)
