"""Barriers and asynchronous copies of the PTX machine: small programs that are right for every seed, and the same ones
with one rule of the PTX manual broken."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from ptx_machine import Module, PtxError, set_seed

SEEDS = range(8)


@pytest.fixture(autouse=True)
def in_turns() -> Iterator[None]:
    yield
    set_seed(0)


def module(body: str, directives: str = "") -> Module:
    """A kernel ``k(in, out, steps)`` with 4096 bytes of shared memory, of which the last 64 are for barriers."""
    return Module(f"""
        .version 8.6
        .target sm_90a
        .address_size 64
        .visible .entry k(.param .u64 in, .param .u64 out, .param .u32 steps) {directives}
        {{
            .reg .pred %p<8>;
            .reg .b32 %r<32>;
            .reg .b64 %rd<16>, %in, %out;
            .shared .align 128 .b8 bytes[4096];
            ld.param.u64 %in, [in];
            ld.param.u64 %out, [out];
            ld.param.u32 %r1, [steps];
            mov.u32 %r0, %tid.x;
            mov.u32 %r2, bytes;
            {body}
            ret;
        }}
    """)


def outcomes(body: str, data: torch.Tensor, expected: torch.Tensor, threads: int, steps: int = 0) -> list[str]:
    """Per seed "right", "wrong", or what the machine complained of."""
    found = []
    program = module(body)
    for seed in SEEDS:
        set_seed(seed)
        out = torch.full_like(expected, -1)
        try:
            program.launch("k", 1, threads, data, out, steps)
            found.append("right" if torch.equal(out, expected) else "wrong")
        except PtxError as error:
            found.append(str(error))
    return found


def noticed(found: list[str]) -> bool:
    """By all seeds but 0, or by some: when work is done at once, a missing wait changes nothing."""
    return any(each != "right" for each in found[1:])


def run(body: str, threads: int = 32, data: torch.Tensor | None = None, steps: int = 0, seed: int = 1) -> torch.Tensor:
    """What each thread wrote to its word of ``out``."""
    set_seed(seed)
    out = torch.full((threads,), -1, dtype=torch.int32)
    module(body).launch("k", 1, threads, torch.arange(1024, dtype=torch.int32) if data is None else data, out, steps)
    return out


# ---- a producer's bulk copies, two stages, and 32 consumers that add them up ----

# Stages of 512 bytes at 0 and 512; "full" barriers at 4032 and 4040, "empty" ones at 4048 and 4056.
PIPELINE = """
    setp.eq.u32 %p0, %r0, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r2+4032], 1;
    @%p0 mbarrier.init.shared::cta.b64 [%r2+4040], 1;
    @%p0 mbarrier.init.shared::cta.b64 [%r2+4048], 32;
    @%p0 mbarrier.init.shared::cta.b64 [%r2+4056], 32;
    @%p0 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    mov.u32 %r3, 0;                       // step
    mov.u32 %r20, 0;                      // sum
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra producer;
consumer:
    setp.ge.u32 %p2, %r3, %r1;
    @%p2 bra done;
    and.b32 %r4, %r3, 1;                  // stage
    shr.u32 %r5, %r3, 1;
    and.b32 %r5, %r5, 1;                  // parity
    shl.b32 %r6, %r4, 3;
    add.u32 %r6, %r6, %r2;
full:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r6+4032], %r5;
    @!%p3 bra full;
    shl.b32 %r7, %r4, 9;
    add.u32 %r7, %r7, %r2;
    mad.lo.u32 %r7, %r0, 16, %r7;
    ld.shared.v4.b32 {%r8, %r9, %r10, %r11}, [%r7];
    add.u32 %r8, %r8, %r9;
    add.u32 %r10, %r10, %r11;
    mad.lo.u32 %r20, %r20, 3, %r8;
    add.u32 %r20, %r20, %r10;
    mbarrier.arrive.shared::cta.b64 _, [%r6+4048];
    add.u32 %r3, %r3, 1;
    bra consumer;
done:
    mad.wide.u32 %rd0, %r0, 4, %out;
    st.global.b32 [%rd0], %r20;
    ret;
producer:
    setp.ne.u32 %p2, %r0, 32;
    @%p2 ret;
produce:
    setp.ge.u32 %p2, %r3, %r1;
    @%p2 ret;
    and.b32 %r4, %r3, 1;
    shr.u32 %r5, %r3, 1;
    and.b32 %r5, %r5, 1;
    xor.b32 %r5, %r5, 1;                  // of the phase before
    shl.b32 %r6, %r4, 3;
    add.u32 %r6, %r6, %r2;
empty:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r6+4048], %r5;
    @!%p3 bra empty;
    add.u32 %r9, %r6, 4032;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 512;
    shl.b32 %r7, %r4, 9;
    add.u32 %r7, %r7, %r2;
    add.u32 %r8, %r7, 256;
    mad.wide.u32 %rd0, %r3, 512, %in;
    add.u64 %rd1, %rd0, 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r7], [%rd0], 256, [%r9];
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r8], [%rd1], 256, [%r9];
    add.u32 %r3, %r3, 1;
    bra produce;
"""
STEPS = 7


def pipeline(pattern: str = "", replacement: str = "") -> list[str]:
    data = torch.arange(STEPS * 128, dtype=torch.int32).reshape(STEPS, 32, 4) % 101
    expected = torch.zeros(32, dtype=torch.int32)
    for step in data.sum(2, dtype=torch.int32):
        expected = expected * 3 + step
    body, count = re.subn(pattern, replacement, PIPELINE, count=1) if pattern else (PIPELINE, 1)
    assert count == 1
    return outcomes(body, data, expected, 64, STEPS)


def test_a_pipeline_of_bulk_copies_is_right_for_every_order() -> None:
    assert set(pipeline()) == {"right"}


@pytest.mark.parametrize(
    ("pattern", "replacement", "complaint"),
    [
        ("fence.mbarrier_init.release.cluster", "mov.u32 %r9, 0", "initialised with no fence"),
        (r"@%p0 mbarrier.init.shared::cta.b64 \[%r2\+4040\], 1;", "", "no mbarrier was initialised"),
        (r"\[%r2\+4048\], 32", "[%r2+4048], 31", "arrivals at an mbarrier that waits for 0|any wait saw"),
        (r"\[%r2\+4048\], 32", "[%r2+4048], 33", "deadlock"),
        (r"\[%r9\], 512", "[%r9], 528", "deadlock"),
        (r"\[%rd1\], 256", "[%rd1], 240", "deadlock"),
        (r"\[%rd1\], 256", "[%rd1], 250", "not a multiple of 16"),
        (r"%rd0, 256;", "%rd0, 248;", "not aligned to 16 bytes"),
        (r"add.u32 %r8, %r7, 256", "add.u32 %r8, %r7, 264", "not aligned to 16"),
        (r"\[%r6\+4048\];\n    add", "[%r6+4048], 2;\n add", "arrivals at an mbarrier|any wait saw"),
        ("xor.b32 %r5, %r5, 1; ", "", "deadlock"),
    ],
)
def test_broken_pipelines_are_errors(pattern: str, replacement: str, complaint: str) -> None:
    assert any(re.search(complaint, found) for found in pipeline(pattern, replacement))


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("@!%p3 bra full;", ""),  # the wait may give up
        ("@!%p3 bra empty;", ""),
        (r"\[%r6\+4032\], %r5;", "[%r6+4032], 1;"),  # the phase before the first: it is over
        (r"\[%r9\], 512", "[%r9], 256"),  # the second copy's bytes may come after the phase
        (r"(?s)(    mbarrier.arrive.shared::cta.b64 _, \[%r6\+4048\];\n)", ""),
    ],
)
def test_pipelines_that_do_not_wait_are_noticed(pattern: str, replacement: str) -> None:
    assert noticed(pipeline(pattern, replacement))


# ---- mbarrier ----

INIT = "setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared.b64 [%r2], {count}; bar.sync 0;"
WRITE = "mad.wide.u32 %rd0, %r0, 4, %out; st.global.b32 [%rd0], {value};"


def test_states_and_counts() -> None:
    written = run(f"""
        {INIT.format(count=40)}
        setp.ne.u32 %p1, %r0, 0;
        @%p1 ret;
        mbarrier.arrive.shared.b64 %rd1, [%r2], 5;
        mbarrier.test_wait.shared.b64 %p2, [%r2], %rd1;
        selp.u32 %r10, 1, 0, %p2;
        mbarrier.pending_count.b64 %r11, %rd1;
        mbarrier.arrive.noComplete.shared.b64 %rd2, [%r2], 4;
        mbarrier.pending_count.b64 %r12, %rd2;
        mbarrier.arrive_drop.shared.b64 _, [%r2], 31;
        mbarrier.test_wait.shared.b64 %p2, [%r2], %rd1;
        selp.u32 %r13, 1, 0, %p2;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 0;
        selp.u32 %r14, 1, 0, %p2;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 1;
        selp.u32 %r15, 1, 0, %p2;
        mbarrier.arrive.shared.b64 %rd3, [%r2], 8;      // 40 - 31 are expected now
        mbarrier.pending_count.b64 %r16, %rd3;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 64;
        mbarrier.test_wait.shared.b64 %p2, [%r2], %rd3;
        selp.u32 %r17, 1, 0, %p2;
        mbarrier.complete_tx.shared.b64 [%r2], 64;
        mbarrier.test_wait.shared.b64 %p2, [%r2], %rd3;
        selp.u32 %r18, 1, 0, %p2;
        mbarrier.inval.shared.b64 [%r2];
        mbarrier.init.shared.b64 [%r2], 1;
        st.global.v4.b32 [%out], {{%r10, %r11, %r12, %r13}};
        st.global.v4.b32 [%out+16], {{%r14, %r15, %r16, %r17}};
        st.global.b32 [%out+32], %r18;
    """)
    assert written[:9].tolist() == [0, 40, 35, 1, 1, 0, 9, 0, 1]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("mbarrier.arrive.shared.b64 _, [%r2+8];", "no mbarrier was initialised"),
        ("mbarrier.init.shared.b64 [%r2], 1;", "not invalidated"),
        ("mbarrier.init.shared.b64 [%r2+16], 0;", "expects 1 to"),
        ("mbarrier.init.shared.b64 [%r2+12], 1;", "not aligned to 8"),
        ("mbarrier.arrive.shared.b64 _, [%r2], 3;", "3 arrivals at an mbarrier that waits for 2"),
        ("mbarrier.arrive.noComplete.shared.b64 _, [%r2], 2;", "noComplete completes"),
        ("mbarrier.arrive.shared.b64 _, [%r2], 2; mbarrier.arrive.shared.b64 _, [%r2];", "before any wait saw"),
        ("st.shared.b32 [%r2], %r0; mbarrier.arrive.shared.b64 _, [%r2];", "was overwritten"),
        ("mbarrier.expect_tx.shared.b64 [%r2], 1048576;", "out of range"),
        ("mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 2;", "parity"),
        ("mbarrier.inval.shared.b64 [%r2]; mbarrier.arrive.shared.b64 _, [%r2];", "no mbarrier was initialised"),
    ],
)
def test_misused_barriers_are_errors(body: str, complaint: str) -> None:
    with pytest.raises(PtxError, match=complaint):
        run(f"{INIT.format(count=2)} setp.ne.u32 %p1, %r0, 0; @%p1 ret; {body}")


# ---- cp.async ----

COPY = "shl.b32 %r3, %r0, 4; add.u32 %r4, %r2, %r3; mad.wide.u32 %rd1, %r0, 16, %in;"
# The first word that the next lane copied.
LOOK = "xor.b32 %r5, %r3, 16; add.u32 %r5, %r5, %r2; ld.shared.b32 %r6, [%r5];" + WRITE.format(value="%r6")
DATA = torch.arange(1024, dtype=torch.int32)
NEIGHBOURS = (torch.arange(32, dtype=torch.int32) ^ 1) * 4
ISSUE = f"{COPY} cp.async.cg.shared.global [%r4], [%rd1], 16;"


@pytest.mark.parametrize(
    ("waits", "enough"),
    [
        ("cp.async.wait_all;", True),
        ("cp.async.commit_group; cp.async.wait_group 0;", True),
        ("cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;", True),
        ("cp.async.commit_group; cp.async.wait_group 1;", False),
        ("cp.async.wait_group 0;", False),
        ("", False),
    ],
)
def test_copies_are_there_after_their_wait(waits: str, enough: bool) -> None:
    found = outcomes(f"{ISSUE} {waits} bar.warp.sync 0xffffffff; {LOOK}", DATA, NEIGHBOURS, 32)
    assert set(found) == {"right"} if enough else noticed(found)


@pytest.mark.parametrize("noinc", ["", ".noinc"])
def test_a_barrier_tells_that_copies_are_done(noinc: str) -> None:
    count = 64 if noinc else 32
    body = f"""
        {INIT.format(count=count)} {ISSUE}
        cp.async.mbarrier.arrive{noinc}.shared.b64 [%r2+ 0 ];
        mbarrier.arrive.shared.b64 %rd2, [%r2];
    again: mbarrier.test_wait.shared.b64 %p2, [%r2], %rd2;
        @!%p2 bra again;
        {LOOK}
    """.replace("add.u32 %r4, %r2, %r3", "add.u32 %r4, %r2, %r3; add.u32 %r4, %r4, 512")
    body = body.replace("add.u32 %r5, %r5, %r2", "add.u32 %r5, %r5, %r2; add.u32 %r5, %r5, 512")
    assert set(outcomes(body, DATA, NEIGHBOURS, 32)) == {"right"}
    assert noticed(outcomes(body.replace(f"cp.async.mbarrier.arrive{noinc}.shared.b64 [%r2+ 0 ];", ""), DATA, NEIGHBOURS, 32))


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ("16, 16", [4, 5, 6, 7]),
        ("16, 8", [4, 5, 0, 0]),
        ("16, 6", [4, 5, 0, 0]),
        ("16, 0", [0, 0, 0, 0]),
        ("8", [4, 5, -1, -1]),
        ("4, %r7", [4, -1, -1, -1]),
        ("16, %p3", [4, 5, 6, 7]),
        ("16, %p4", [0, 0, 0, 0]),
        ("16, !%p4", [4, 5, 6, 7]),
    ],
)
def test_sizes_of_copies(control: str, words: list[int]) -> None:
    body = f"""
        {COPY} mov.u32 %r7, 4; setp.eq.u32 %p3, 1, 2; setp.eq.u32 %p4, 1, 1;
        cp.async.ca.shared.global.L2::128B [%r4], [%rd1], {control};
        cp.async.wait_all; bar.warp.sync 0xffffffff;
        mov.b32 %r8, %r0; add.u32 %r9, %r2, 16; mad.lo.u32 %r9, %r0, 4, %r9;
        ld.shared.b32 %r10, [%r9]; {WRITE.format(value="%r10")}
    """
    assert run(body)[:4].tolist() == words


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (f"{COPY} cp.async.ca.shared.global [%r4], [%rd1], 4, 8;", "larger than cp-size"),
        (f"{COPY} add.u64 %rd1, %rd1, 4; cp.async.cg.shared.global [%r4], [%rd1], 16;", "source is not aligned"),
        (f"{COPY} add.u32 %r4, %r4, 4; cp.async.cg.shared.global [%r4], [%rd1], 16;", "not aligned to 16"),
        (f"{COPY} add.u32 %r4, %r4, 4096; cp.async.cg.shared.global [%r4], [%rd1], 16;", "not in the block's"),
        ("cp.async.cg.shared.global [%r2], [%in], 8;", "not known"),
    ],
)
def test_misused_copies_are_errors(body: str, complaint: str) -> None:
    with pytest.raises(PtxError, match=complaint):
        run(body)


# ---- cp.async.bulk to global memory ----

STORE = """
    mad.lo.u32 %r3, %r0, 4, %r2; st.shared.b32 [%r3], %r0;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra end;
    cp.async.bulk.global.shared::cta.bulk_group [%out], [%r2], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    st.shared.b32 [%r2], 77;
    cp.async.bulk.wait_group 0;
    ld.global.b32 %r4, [%out+4];
    add.u32 %r4, %r4, 1000;
    st.global.b32 [%out+4], %r4;
end:
"""
STORED = torch.arange(32, dtype=torch.int32) + torch.tensor([0, 1000] + [0] * 30, dtype=torch.int32)


def test_bulk_copies_to_global_memory() -> None:
    assert set(outcomes(STORE, DATA, STORED, 32)) == {"right"}


@pytest.mark.parametrize(
    ("line", "replacement"),
    [
        ("fence.proxy.async.shared::cta;", ""),
        ("fence.proxy.async.shared::cta;", "fence.proxy.async.global;"),
        ("cp.async.bulk.wait_group.read 0;", ""),
        ("cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group.read 1;"),
        ("cp.async.bulk.wait_group 0;", ""),
    ],
)
def test_bulk_copies_that_nobody_waits_for_are_noticed(line: str, replacement: str) -> None:
    assert noticed(outcomes(STORE.replace(line, replacement), DATA, STORED, 32))


# ---- registers and clusters ----


@pytest.mark.parametrize(
    ("directives", "more", "less", "complaint"),
    [
        (".maxntid 384, 1, 1", 232, 40, ""),
        (".maxntid 384, 1, 1", 240, 24, ""),
        (".maxntid 384, 1, 1", 240, 40, "deadlock"),
        (".maxntid 384, 1, 1", 160, 40, "the wrong way"),
        (".maxntid 384, 1, 1 .minnctapersm 2", 160, 40, "deadlock"),
        (".maxntid 384, 1, 1 .minnctapersm 2", 96, 40, ""),
        ("", 240, 40, ""),
        (".maxntid 384, 1, 1", 244, 40, "not known"),
        (".maxntid 384, 1, 1", 264, 40, "not known"),
    ],
)
def test_registers_that_move_between_warps(directives: str, more: int, less: int, complaint: str) -> None:
    body = f"""
        setp.lt.u32 %p0, %r0, 128;
        @%p0 bra give;
        setmaxnreg.inc.sync.aligned.u32 {more};
        bra end;
    give: setmaxnreg.dec.sync.aligned.u32 {less};
    end: {WRITE.format(value="%r0")}
    """
    out = torch.zeros(384, dtype=torch.int32)
    if not complaint:
        module(body, directives).launch("k", 1, 384, out, out, 0)
        assert out.tolist() == list(range(384))
    else:
        with pytest.raises(PtxError, match=complaint):
            module(body, directives).launch("k", 1, 384, out, out, 0)


def test_a_cluster_of_one_block() -> None:
    body = f"""
        mapa.shared::cluster.u32 %r3, %r2, 0;
        mad.lo.u32 %r4, %r0, 4, %r3; st.shared.b32 [%r4], %r0;
        griddepcontrol.wait;
        barrier.cluster.arrive.release.aligned;
        barrier.cluster.wait.acquire.aligned;
        xor.b32 %r5, %r0, 63; mad.lo.u32 %r4, %r5, 4, %r3; ld.shared.b32 %r6, [%r4];
        barrier.cluster.arrive; barrier.cluster.wait;
        {WRITE.format(value="%r6")}
    """
    for seed in SEEDS:
        assert run(body, 64, seed=seed).tolist() == [i ^ 63 for i in range(64)]
    with pytest.raises(PtxError, match="no such block"):
        run("mapa.shared::cluster.u32 %r3, %r2, 1;")
