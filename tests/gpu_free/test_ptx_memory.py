"""Loads, stores and atomics of the PTX machine: what they read and write, and what a GPU would fault at."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from ptx_machine import Module, PtxError
from ptx_truth import check, evaluate, integers, signed, width


def run(body: str, *arrays: Any, threads: int = 32, shared: int = 256, before: str = "") -> None:
    """Parameters p0, p1, ... are the addresses of arrays, also in %p0..; %r0 is the thread."""
    names = [f"p{k}" for k in range(len(arrays))]
    module = Module(f"""
        .version 8.6
        .target sm_90a
        .address_size 64
        {before}
        .extern .shared .align 16 .b8 dynamic[];
        .visible .entry k({", ".join(f".param .u64 {name}" for name in names)}) {{
            .reg .pred %q<8>; .reg .b16 %h<32>; .reg .b32 %r<32>; .reg .b64 %rd<32>;
            .reg .b64 %p<8>; .reg .f32 %f<8>; .reg .f64 %fd<4>;
            {" ".join(f"ld.param.u64 %{name}, [{name}];" for name in names)}
            mov.u32 %r0, %tid.x;
            {body}
            ret;
        }}""")
    values = [ctypes.c_uint64(x.ctypes.data if isinstance(x, np.ndarray) else x) for x in arrays]
    module.launch("k", 1, threads, *values, shared=shared)


def aligned(n: int) -> np.ndarray:
    """Bytes that vectors of 64 may be at."""
    room = np.zeros(n + 64, np.uint8)
    return room[-room.ctypes.data % 64 :][:n]


def bytes_of(n: int) -> np.ndarray:
    data = aligned(n)
    data[:] = np.frombuffer(np.random.default_rng(0).bytes(n), np.uint8)
    return data


TYPES = [k + str(bits) for bits in (8, 16, 32, 64) for k in "bus"] + ["f32", "f64"]


@pytest.mark.parametrize("t", TYPES)
def test_loads_extend_to_their_register(t: str) -> None:
    bits = int(t[1:])
    data = bytes_of(1024)
    numbers, address = data.view(f"u{bits // 8}"), data.ctypes.data
    inputs = ("u64", [address + k * bits // 8 for k in range(100)])
    for register in ("u16", "u32", "u64"):
        if width(register) < bits:
            continue

        def truth(at: int, register: str = register) -> int:
            x = int(numbers[(at - address) * 8 // bits])
            return signed(x, bits) % 2 ** width(register) if t[0] == "s" else x

        for how in ("", ".global", ".global.nc", ".volatile.global", ".relaxed.gpu.global", ".acquire.sys",
                    ".global.L1::evict_last.L2::128B", ".global.ca"):  # fmt: skip
            check(f"ld{how}.{t} %d, [%a];", register, truth, inputs)


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("space", ["global", "", "shared", "shared::cta", "local"])
def test_what_was_stored_is_loaded(t: str, space: str) -> None:
    bits = int(t[1:])
    register = f"b{width(t)}"
    words = integers(width(t), 64)
    where = {"local": "mov.u64 %rd1, room;", "": "mov.u64 %rd1, room; cvta.local.u64 %rd1, %rd1;"}.get(
        space, "mov.u64 %rd1, dynamic;"
    )
    dot = f".{space}" if space else ""
    if space == "global":
        where, dot = "mov.u64 %rd1, %a;", ".global"
    scratch = np.zeros((64, 16), np.uint8)
    line = (
        ".local .align 8 .b8 room[16]; .reg .b64 %address;"
        if space in ("local", "")
        else ".shared .align 8 .b8 dynamic[4096]; .reg .b64 %address;"
    )
    offset = (
        "cvt.u64.u32 %rd0, %j; mul.lo.u64 %rd0, %rd0, 16; add.s64 %rd1, %rd1, %rd0;" if space.startswith("sh") else ""
    )
    move = f"{line} {where} {offset} st{dot}.{t} [%rd1+8], %b; ld{dot}.{t.replace('s', 'u')} %d, [%rd1+8];"
    addresses = [scratch.ctypes.data + 16 * k for k in range(64)]
    found = evaluate(move, register, ("u64", addresses), (register, words))
    assert found == [x % 2**bits for x in words]
    if space == "global":
        kept = scratch[:, 8 : 8 + bits // 8].copy().view(f"u{bits // 8}")[:, 0]
        assert kept.tolist() == [x % 2**bits for x in words]
        assert not scratch[:, 8 + bits // 8 :].any()


@pytest.mark.parametrize("t", ["b8", "b16", "b32", "b64"])
def test_vectors(t: str) -> None:
    size = int(t[1:]) // 8
    register = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}[size]
    for n in (1, 2, 4, 8):
        data, out = bytes_of(32 * n * size), aligned(32 * n * size)
        names = [f"{register}{10 + k}" for k in range(n)]
        v = f".v{n}" if n > 1 else ""
        run(
            f"""mul.wide.u32 %rd0, %r0, {n * size};
            add.s64 %rd1, %p0, %rd0; add.s64 %rd2, %p1, %rd0;
            ld.global{v}.{t} {{{",".join(names)}}}, [%rd1];
            st.global{v}.{t} [%rd2], {{{",".join(reversed(names))}}};""",
            data,
            out,
        )
        elements = data.view(f"u{size}").reshape(32, n)
        assert out.view(f"u{size}").reshape(32, n).tolist() == elements[:, ::-1].tolist()


def test_parts_of_vectors_may_go_nowhere() -> None:
    data, out = np.arange(4, dtype=np.uint32), np.zeros(1, np.uint32)
    run("ld.global.v4.u32 {_, _, %r1, _}, [%p0]; st.global.u32 [%p1], %r1;", data, out, threads=1)
    assert out[0] == 2


def test_hints_and_policies() -> None:
    data, out = np.array([7], np.uint32), np.zeros(1, np.uint32)
    run(
        """createpolicy.fractional.L2::evict_last.b64 %rd1, 1.0;
        prefetch.global.L2 [%p0];
        ld.global.L1::evict_last.L2::cache_hint.b32 %r1, [%p0], %rd1;
        discard.global.L2 [%p0], 128;
        applypriority.global.L2::evict_normal [%p0], 128;
        membar.gl; fence.acq_rel.gpu; fence.sc.sys; membar.cta;
        st.global.L2::cache_hint.b32 [%p1], %r1, %rd1;
        nanosleep.u32 100;""",
        data,
        out,
        threads=1,
    )
    assert out[0] == 7


def test_spaces_of_addresses() -> None:
    """Generic addresses lead to their space, cvta back, and isspacep tells which it is."""
    out = np.zeros((4, 32), np.uint32)
    run(
        """.local .align 4 .b8 room[4];
        mul.wide.u32 %rd9, %r0, 4;
        add.s64 %p0, %p0, %rd9;
        mov.u64 %rd1, dynamic; add.s64 %rd1, %rd1, %rd9; cvta.shared.u64 %rd2, %rd1;
        mov.u64 %rd3, room; cvta.local.u64 %rd4, %rd3;
        st.u32 [%rd2], %r0; st.u32 [%rd4], %r0;
        ld.shared.u32 %r1, [%rd1]; ld.local.u32 %r2, [%rd3];
        add.u32 %r1, %r1, %r2; st.global.u32 [%p0], %r1;
        cvta.to.shared.u64 %rd5, %rd2; cvta.to.local.u64 %rd6, %rd4; cvta.to.global.u64 %rd7, %p0;
        cvta.global.u64 %rd7, %rd7;
        setp.eq.u64 %q1, %rd5, %rd1; setp.eq.and.u64 %q1, %rd6, %rd3, %q1; setp.eq.and.u64 %q1, %rd7, %p0, %q1;
        selp.u32 %r3, 1, 0, %q1; st.u32 [%p0+128], %r3;
        isspacep.shared %q1, %rd2; isspacep.local %q2, %rd4; isspacep.global %q3, %p0;
        and.pred %q1, %q1, %q2; and.pred %q1, %q1, %q3; selp.u32 %r3, 1, 0, %q1; st.u32 [%p0+256], %r3;
        isspacep.shared %q1, %p0; isspacep.local %q2, %rd2; isspacep.global %q3, %rd4;
        or.pred %q1, %q1, %q2; or.pred %q1, %q1, %q3; selp.u32 %r3, 1, 0, %q1; st.u32 [%p0+384], %r3;""",
        out,
    )
    assert out.tolist() == [[2 * k for k in range(32)], [1] * 32, [1] * 32, [0] * 32]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("ld.global.u32 %r1, [%p0+2];", r"0x[0-9a-f]+ is no multiple of 4"),
        ("ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%p0+8];", "no multiple of 16"),
        ("st.global.v2.u64 [%p0+8], {%rd1,%rd1};", "no multiple of 16"),
        ("st.u16 [%p0+1], %h1;", "no multiple of 2"),
        ("mov.u64 %rd1, 0; ld.global.u32 %r1, [%rd1+8];", "null"),
        ("mov.u64 %rd1, 0; st.u8 [%rd1], %h1;", "null"),
        ("mov.u64 %rd1, dynamic; cvta.shared.u64 %rd1, %rd1; ld.global.u32 %r1, [%rd1];", "not of global memory"),
        ("cvta.to.shared.u64 %rd1, %p0;", "another space"),
        ("ld.shared.u32 %r1, [dynamic+254];", "aligned"),
        ("ld.shared.v4.u32 {%r1,%r2,%r3,%r4}, [dynamic+248];", "aligned"),
        ("st.shared.u64 [dynamic+256], %rd1;", "256 bytes of shared memory"),
        ("mov.u64 %rd1, 8; cvta.local.u64 %rd1, %rd1; ld.u32 %r1, [%rd1];", "outside"),
        ("ld.local.u16 %h1, [room+1];", "no multiple of 2"),
        ("ld.param.u32 %r1, [p0+8];", "outside"),
        ("atom.global.add.u32 %r1, [%p0+2], 1;", "no multiple of 4"),
        ("atom.shared.cas.b64 %rd1, [dynamic+4], 1, 2;", "aligned"),
        ("red.global.add.f64 [%p0+4], %fd1;", "no multiple of 8"),
        ("trap;", "trap"),
        ("setp.eq.u32 %q1, %r0, 1; @%q1 bra end; brkpt; end:", "trap"),
    ],
)
def test_faults(line: str, why: str) -> None:
    data = np.zeros(64, np.uint64)
    with pytest.raises(PtxError, match=why):
        run(f".local .align 8 .b8 room[8]; {line}", data)


def test_faults_name_the_lane() -> None:
    data = np.zeros(64, np.uint32)
    body = "mul.lo.u32 %r1, %r0, 4; setp.eq.u32 %q1, %r0, 5; @%q1 add.u32 %r1, %r1, 2; cvt.u64.u32 %rd1, %r1;"
    with pytest.raises(PtxError, match=r"thread \(5,0,0\).*no multiple of 4"):
        run(f"{body} add.s64 %rd1, %rd1, %p0; ld.global.u32 %r2, [%rd1];", data)


@pytest.mark.parametrize(
    ("store", "at"),
    [
        ("st.shared.u8 [dynamic+31], %h1;", 16),
        ("st.shared::cta.v4.u32 [dynamic+16], {%r1, %r1, %r1, %r1};", 16),
        ("mov.u64 %rd1, dynamic; cvta.shared.u64 %rd1, %rd1; st.u32 [%rd1+32], %r1;", 32),
        ("st.shared.v4.b64 [dynamic+32], {%rd1, %rd1, %rd1, %rd1};", 48),
        ("red.shared.add.u32 [dynamic+16], 1;", 16),
    ],
)
def test_stores_are_not_seen_by_copies_without_a_fence(store: str, at: int) -> None:
    def copy(fence: str, where: int) -> None:
        run(
            f"""{store} {fence}
            cp.async.bulk.global.shared::cta.bulk_group [%p0], [dynamic+{where}], 16;
            cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;""",
            aligned(16),
            threads=1,
        )

    copy("fence.proxy.async.shared::cta;", at)
    copy("", 64)
    with pytest.raises(PtxError, match="fence"):
        copy("", at)


# ---- atomics ----


def wrap(x: int, t: str) -> int:
    bits = int(t[1:])
    return signed(x, bits) if t[0] == "s" else x % 2**bits


ATOMS: dict[str, tuple[Sequence[str], Callable[..., int]]] = {
    "add": (("u32", "s32", "u64"), lambda old, b: old + b),
    "min": (("u32", "s32", "u64", "s64"), min),
    "max": (("u32", "s32", "u64", "s64"), max),
    "and": (("b32", "b64"), lambda old, b: old & b),
    "or": (("b32", "b64"), lambda old, b: old | b),
    "xor": (("b32", "b64"), lambda old, b: old ^ b),
    "exch": (("b32", "b64"), lambda old, b: b),
    "inc": (("u32",), lambda old, b: 0 if old >= b else old + 1),
    "dec": (("u32",), lambda old, b: b if old == 0 or old > b else old - 1),
    "cas": (("b16", "b32", "b64"), lambda old, b, c: c if old == b else old),
}


@pytest.mark.parametrize("space", ["", ".global", ".shared"])
@pytest.mark.parametrize("op", ATOMS)
def test_atomics(op: str, space: str) -> None:
    types, of = ATOMS[op]
    for t, red in itertools.product(types, (False, True)):
        if red and op in ("exch", "cas"):
            continue
        bits = int(t[1:])
        size = bits // 8
        old, b = np.array(integers(bits, 32), f"u{size}"), np.array(integers(bits, 32, 1), f"u{size}")
        b[::3] = old[::3]
        c = np.array(integers(bits, 32, 2), f"u{size}")
        got, after = np.zeros_like(old), old.copy()
        register = {2: "%h", 4: "%r", 8: "%rd"}[size]
        d, x, y, z = (f"{register}{k}" for k in (20 if size > 2 else 10, 5, 6, 7))
        third = f", {z}" if op == "cas" else ""
        atom = (
            f"red{space}.{op}.{t} [%rd1], {y};" if red else f"atom.relaxed.gpu{space}.{op}.{t} {d}, [%rd1], {y}{third};"
        )
        run(
            f"""mul.wide.u32 %rd9, %r0, {size};
            add.s64 %p0, %p0, %rd9; add.s64 %p1, %p1, %rd9; add.s64 %p2, %p2, %rd9; add.s64 %p3, %p3, %rd9;
            ld.global.b{bits} {x}, [%p0]; ld.global.b{bits} {y}, [%p1]; ld.global.b{bits} {z}, [%p2];
            mov.b{bits} {d}, 0;
            mov.u64 %rd1, {"dynamic" if space == ".shared" else "%p0"};
            {f"add.s64 %rd1, %rd1, %rd9; st.shared.b{bits} [%rd1], {x};" if space == ".shared" else ""}
            {atom}
            st.global.b{bits} [%p3], {d};
            {f"ld.shared.b{bits} {x}, [%rd1]; st.global.b{bits} [%p0], {x};" if space == ".shared" else ""}""",
            after,
            b,
            c,
            got,
        )
        assert got.tolist() == ([0] * 32 if red else old.tolist())
        rows = zip(old.tolist(), b.tolist(), c.tolist(), strict=True)
        expected = [wrap(of(*(wrap(v, t) for v in row[: 3 if op == "cas" else 2])), t) % 2**bits for row in rows]
        assert after.tolist() == expected, (op, t)


def test_atomics_of_one_address_see_one_another() -> None:
    count, got = np.zeros(1, np.uint32), np.zeros(96, np.uint32)
    run("atom.global.add.u32 %r1, [%p0], 1; mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd1, %p1; st.u32 [%rd1], 1;",
        count, got, threads=96)  # fmt: skip
    assert count[0] == 96
    assert got.all()


def test_sums_of_floats() -> None:
    """One rounding each; those of f32 in global memory flush subnormals, those in shared memory do not."""
    tiny = np.float32(1e-40)
    singles, doubles = np.array([tiny, 1.5, 0.0], np.float32), np.array([0.1, 0.0])
    halves = np.array([1.0, 2.0, 65504.0, 100.0], np.float16)
    run(
        """mov.f32 %f1, 0f000116C2;
        red.global.add.f32 [%p0], %f1; atom.global.add.f32 %f2, [%p0+4], 2.25;
        st.shared.f32 [dynamic], %f1; atom.shared.add.f32 %f3, [dynamic], %f1; ld.shared.f32 %f3, [dynamic];
        st.global.f32 [%p0+8], %f3;
        atom.add.f64 %fd1, [%p1], 0.2; st.global.f64 [%p1+8], %fd1;
        mov.b16 %h1, 0x3C01; atom.global.add.noftz.f16 %h2, [%p2], %h1;
        mov.b32 %r1, {%h1, %h1}; atom.global.add.noftz.f16x2 %r2, [%p2+4], %r1;""",
        singles,
        doubles,
        halves,
        threads=1,
    )
    assert singles.tolist()[:2] == [0.0, 3.75]
    assert singles[2] == np.uint32(2 * 0x116C2).view(np.float32)
    assert doubles.tolist() == [0.1 + 0.2, 0.1]
    assert halves.tolist() == [2.0, 2.0, 65504.0, 101.0]
