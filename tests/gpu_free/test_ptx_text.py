"""What the PTX machine reads: names, scopes, numbers, parameters, variables, and what it cannot read."""

from __future__ import annotations

import re
import struct

import pytest
import torch
from ptx_machine import Module, PtxError
from ptx_text import module, run


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
