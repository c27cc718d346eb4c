"""What the PTX machine reads, in which order it runs threads, and what it refuses: small programs written by hand."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

import pytest
import torch
from ptx_machine import SEEDS, Module, PtxError, instructions, launches, set_seed, set_shared_limit


@pytest.fixture(autouse=True, params=SEEDS)
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    set_seed(request.param)
    yield request.param
    set_seed(0)
    set_shared_limit(227 * 1024)


def module(body: str, parameters: str = ".param .u64 out", before: str = "", directives: str = "") -> Module:
    """A kernel ``k`` with the registers that the bodies here use; ``%out`` is the first parameter."""
    return Module(f"""
        .version 8.0
        .target sm_90a
        .address_size 64
        {before}
        .visible .entry k({parameters})
        {directives}
        {{
            .reg .pred %p<8>;
            .reg .b32 %r<16>;
            .reg .b64 %rd<16>;
            .reg .f32 %f<8>;
            .reg .b64 %out;
            ld.param.u64 %out, [out];
            cvta.to.global.u64 %out, %out;
            mov.u32 %r0, %tid.x;
            mul.wide.u32 %rd0, %r0, 4;
            add.s64 %out, %out, %rd0;
            {body}
            ret;
        }}
    """)


def run(
    body: str, threads: int = 32, blocks: int = 1, shared: int = 0, cooperative: bool = False, **text: str
) -> list[int]:
    """What each thread of a block wrote."""
    out = torch.full((threads,), -1, dtype=torch.int32)
    module(body, **text).launch("k", blocks, threads, out, shared=shared, cooperative=cooperative)
    return out.tolist()


def test_names_are_those_of_the_text() -> None:
    empty = "{ ret; }"
    text = f".version 8.0 .target sm_80\n.address_size 64\n.visible .entry _Z1aPf(.param .u64 _Z1aPf_param_0){empty}"
    both = Module(
        f"{text}\n.entry b() {empty} // .entry c()\n/* .entry d() */\n.section .debug_str {{ .b8 1 \n.b8 2 }}"
    )
    assert both.kernels() == ["_Z1aPf", "b"]
    assert both.parameters("b") == []
    assert both.parameters("_Z1aPf") == [8]
    with pytest.raises(PtxError, match="no kernel c"):
        both.parameters("c")


def test_scopes_have_their_own_registers_and_labels() -> None:
    written = run("""
        mov.u32 %r1, 1;
        { .reg .b32 %r<3>, t; .reg .pred done;
          mov.b32 t, 0;
          mov.u32 %r1, 100;
        again: add.u32 t, t, 1; setp.eq.u32 done, t, 3;
          @!done bra again;
          { .reg .b32 t; mov.b32 t, 50; }
          mov.u32 %r9, t;
        }
        { .reg .b32 t; .reg .pred done; mov.b32 t, 0; again: add.u32 t, t, 5; setp.ge.u32 done, t, 20; @!done bra again;
          add.u32 %r1, %r1, t; }
        add.u32 %r1, %r1, %r9;
        st.global.u32 [%out], %r1;""")
    assert written == [1 + 20 + 3] * 32


def test_numbers() -> None:
    written = run("""
        mov.u32 %r1, 0x10;
        add.s32 %r1, %r1, -0x3;  // 13
        add.u32 %r1, %r1, 010;   /* 21 */
        add.u32 %r1, %r1, 0b101U;
        add.s32 %r1, %r1, 7U;    // 33
        mov.f32 %f1, 0f3F800000;
        add.f32 %f1, %f1, 0f40000000;
        mov.b32 %r2, %f1;
        shr.u32 %r2, %r2, 20;    // 0x404
        add.u32 %r1, %r1, %r2;
        st.global.u32 [%out+-0], %r1;""")
    assert written == [33 + 0x404] * 32


def test_vectors_and_instructions_over_several_lines() -> None:
    written = run("""
        mov.b64 %rd1, { %r0,
                        %r0 };
        mov.b64 {%r1, %r2}, %rd1;
        add.u32 %r1,
                %r1, %r2
                ;
        .pragma "nounroll";
        .loc 1 20 5, function_name $L__info_string0, inlined_at 1 30 4
        st.global.u32 [%out + 0], %r1;""")
    assert written == [2 * i for i in range(32)]


def test_parameters_by_name_and_by_address() -> None:
    text = module(
        """
        mov.b64 %rd1, s;
        add.s64 %rd2, %rd1, 12;
        ld.param.u32 %r1, [%rd2+-8];
        ld.param.u32 %r2, [s+8];
        cvta.param.u64 %rd3, %rd1;
        ld.u32 %r3, [%rd3+12];
        ld.param.v2.u32 {%r6, %r7}, [s];
        sub.u32 %r1, %r1, %r6;
        ld.param.u8 %r4, [small];
        ld.param.f32 %f1, [f];
        cvt.rzi.u32.f32 %r5, %f1;
        add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3; add.u32 %r1, %r1, %r4; add.u32 %r1, %r1, %r5;
        st.global.u32 [%out], %r1;""",
        ".param .u64 .ptr .global .align 16 out, .param .u8 small, .param .align 8 .b8 s[16], .param .f32 f",
    )
    out = torch.zeros(2, dtype=torch.int32)
    assert text.parameters("k") == [8, 1, 16, 4]
    text.launch("k", 1, 2, out, 200, struct.pack("<4I", 1, 20, 300, 4000), 50000.0)
    assert out.tolist() == [-1 + 20 + 300 + 4000 + 200 + 50000] * 2


def test_static_memory_comes_before_dynamic_memory() -> None:
    before = """
        .extern .shared .align 64 .b8 dynamic[];
        .shared .align 4 .b8 outer[12];
        .shared .align 4 .b8 of_other_kernels[4096];"""
    body = """
        .shared .align 8 .b8 inner[8];
        mov.u32 %r1, inner;
        mov.u32 %r2, outer;
        mov.u32 %r3, dynamic;
        shl.b32 %r2, %r2, 8;
        shl.b32 %r3, %r3, 16;
        or.b32 %r1, %r1, %r2;
        or.b32 %r1, %r1, %r3;
        shl.b32 %r4, %r0, 2;
        add.u32 %r5, %r4, %r3;
        mov.u32 %r6, dynamic;
        add.u32 %r6, %r6, %r4;
        st.shared.u32 [%r6], %r0;
        bar.sync 0;
        ld.shared.u32 %r7, [dynamic+4];
        st.global.u32 [%out], %r1;
        setp.eq.u32 %p1, %r0, 0;
        @%p1 st.global.u32 [%out], %r7;"""
    assert run(body, shared=128, before=before) == [1] + [0 | 8 << 8 | 64 << 16] * 31


def test_shared_memory_starts_full_of_ones() -> None:
    assert run("ld.shared.u32 %r1, [4]; st.global.u32 [%out], %r1;", shared=8) == [-1] * 32


def test_local_memory_is_the_threads_own() -> None:
    body = """
        .local .align 16 .b8 __local_depot0[16];
        .reg .b64 %SP; .reg .b64 %SPL;
        mov.u64 %SPL, __local_depot0;
        cvta.local.u64 %SP, %SPL;
        st.local.u32 [%SPL+4], %r0;
        bar.sync 0;
        ld.u32 %r1, [%SP+4];
        st.global.u32 [%out], %r1;"""
    assert run(body, threads=96) == list(range(96))


def test_variables_of_the_module_have_their_values() -> None:
    before = """
        .const .align 4 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 0x3, 0, 0, 0, 4};
        .global .align 4 .u32 counter = 5;
        .global .align 8 .u64 pointers[2] = {generic(counter), counter};
        .global .align 4 .b32 zeros[4];
        .global .align 4 .f32 pairs[2][2] = {{0f3F800000, 0f40000000}, {0f40400000, 1}};"""
    body = """
        mov.u64 %rd1, table;
        and.b32 %r1, %r0, 3;
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd1, %rd1, %rd2;
        ld.const.u32 %r2, [%rd1];
        ld.global.u64 %rd3, [pointers+8];
        ld.global.u32 %r3, [%rd3];
        ld.global.u32 %r4, [zeros+12];
        ld.global.u32 %r5, [pairs+8];
        shr.u32 %r5, %r5, 20;
        add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; add.u32 %r2, %r2, %r5;
        st.global.u32 [%out], %r2;"""
    assert run(body, before=before) == [1 + i % 4 + 5 + 0x404 for i in range(32)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("frobnicate.u32 %r1, %r2;", "not known"),
        ("mov.u32 %r1, %r16;", '"%r16"'),
        ("bra nowhere;", '"nowhere"'),
        ("call (%r1), f, (%r2);", "call are not supported"),
        ("mov.u32 %r1, 12q;", "not a number"),
        ("mov.u32 %r1 %r2;", 'expected ";"'),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(line: str, why: str) -> None:
    text = module(f"\n{line}")
    assert text.kernels() == ["k"]
    with pytest.raises(PtxError, match=r"line 2[0-9]\b.*" + re.escape(why)):
        text.parameters("k")


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
