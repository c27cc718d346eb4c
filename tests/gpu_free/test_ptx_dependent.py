"""Programmatic launches on the PTX machine: nothing of global memory before griddepcontrol.wait."""

from __future__ import annotations

import pytest
import torch
from ptx_machine import Module, PtxError
from ptx_text import module, run

WAIT = "griddepcontrol.wait;"
STORE = "st.global.u32 [%out], %r0;"
ACCESSES = {
    "ld": "ld.global.u32 %r1, [%out];",
    "st": STORE,
    "generic": "st.u32 [%out], %r0;",
    "atom": "atom.global.add.u32 %r1, [%out], 1;",
    "red": "red.global.add.u32 [%out], 1;",
    "cp.async": "mov.u32 %r2, %r0; shl.b32 %r2, %r2, 2; cp.async.ca.shared.global [%r2], [%out], 4;",
    "bulk": """
        setp.ne.u32 %p1, %r0, 0;
        @%p1 ret;
        mbarrier.init.shared.b64 [0], 1;
        fence.mbarrier_init.release.cluster;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [128], [%out], 16, [0];""",
}


def launched(program: Module, programmatic: bool = True) -> list[int]:
    out = torch.full((64,), -1, dtype=torch.int32)
    program.launch("k", 1, 64, out, shared=256, programmatic=programmatic)
    return out.tolist()


@pytest.mark.parametrize("access", ACCESSES)
def test_global_memory_is_accessed_after_the_wait(access: str) -> None:
    launched(module(WAIT + ACCESSES[access]))
    launched(module(ACCESSES[access]), programmatic=False)
    with pytest.raises(PtxError, match=r'line \d+ ".*\[%out\].*thread \(0,0,0\): .*before griddepcontrol.wait'):
        launched(module(ACCESSES[access] + WAIT))


def test_a_thread_does_not_wait_for_another() -> None:
    waits = f"setp.lt.u32 %p1, %r0, 40; @%p1 {WAIT} bar.sync 0; @%p1 {STORE}"
    assert launched(module(waits)) == [*range(40), *[-1] * 24]
    with pytest.raises(PtxError, match=r"thread \(40,0,0\): .*before griddepcontrol.wait"):
        launched(module(waits + STORE))


def test_what_is_not_written_by_launches_ahead_may_be_read_before() -> None:
    """Parameters, constants, shared and local memory; dependents may be let go at any time."""
    constants = ".const .align 4 .b32 numbers[2] = {7, 8};"
    body = f"""
        griddepcontrol.launch_dependents;
        .local .align 4 .b8 stack[16];
        ld.param.u64 %rd1, [out];
        ld.const.u32 %r1, [numbers+4];
        st.shared.u32 [16], %r1;
        st.local.u32 [stack], %r1;
        bar.sync 0;
        ld.shared.u32 %r2, [16];
        {WAIT}
        st.global.u32 [%out], %r2;"""
    assert launched(module(body, before=constants)) == [8] * 64


def test_a_launch_that_never_waits_is_an_error() -> None:
    with pytest.raises(PtxError, match="no thread executed"):
        launched(module("mov.u32 %r1, 0;"))
    assert launched(module("setp.ne.u32 %p1, %r0, 3; @%p1 ret;" + WAIT)) == [-1] * 64


def test_other_controls_and_older_gpus_have_none() -> None:
    with pytest.raises(PtxError, match="not known"):
        run("griddepcontrol.launch;")
    older = Module(f".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() {{ {WAIT} ret; }}")
    with pytest.raises(PtxError, match="no griddepcontrol before sm_90"):
        older.launch("k", 1, 1)
