"""What a launch may access of global memory on the PTX machine, down to the byte."""

from __future__ import annotations

import re

import pytest
import torch
from ptx_machine import PtxError
from ptx_text import module

# What reads or writes 4 bytes, or 16, at %out + 4 * thread.
ACCESSES = {
    "ld": ("ld.global.u32 %r1, [%out];", 4),
    "ld.nc": ("ld.global.nc.u32 %r1, [%out];", 4),
    "st": ("st.global.u32 [%out], %r0;", 4),
    "generic": ("ld.u32 %r1, [%out];", 4),
    "bytes": ("add.s64 %out, %out, 3; ld.global.u8 %r1, [%out];", 4),
    "atom": ("atom.global.add.u32 %r1, [%out], 1;", 4),
    "red": ("red.global.add.u32 [%out], 1;", 4),
    "ld.v4": ("mad.lo.u64 %out, %rd0, 3, %out; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%out];", 16),
    "st.v4": ("mad.lo.u64 %out, %rd0, 3, %out; st.global.v4.u32 [%out], {%r1, %r2, %r3, %r4};", 16),
    "cp.async": ("shl.b32 %r2, %r0, 2; cp.async.ca.shared.global [%r2], [%out], 4;", 4),
}  # fmt: skip


def launched(body: str, count: int, shift: int = 0, **text: str) -> None:
    """By a warp, with ``count`` words of which it gets the address, or one ``shift`` bytes further."""
    out = torch.zeros(count, dtype=torch.int32)
    module(body, **text).launch("k", 1, 32, out.data_ptr() + shift, shared=1024, memory=[out, torch.zeros(3)])


@pytest.mark.parametrize("access", ACCESSES)
def test_one_element_too_many_is_an_error(access: str) -> None:
    body, size = ACCESSES[access]
    launched(body, 8 * size)
    line = re.escape(body.split("; ")[-1].removesuffix(";"))
    which, why = rf'kernel k, line \d+ "{line}", block \(0,0,0\), thread ', r": \d+ bytes? at 0x[0-9a-f]+: \d+ bytes? "
    with pytest.raises(PtxError, match=rf"{which}\(31,0,0\){why}(of them )?behind the end of"):
        launched(body, 8 * size - 1)
    with pytest.raises(PtxError, match=rf"{which}\(0,0,0\){why}(of them )?before the start of"):
        launched(body, 8 * size, shift=-size)


BULK = """
    setp.ne.u32 %p1, %r0, 0;
    @%p1 ret;
    mbarrier.init.shared.b64 [0], 1;
    fence.mbarrier_init.release.cluster;
"""
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [128], [%out], 64, [0];"
STORE = "cp.async.bulk.global.shared::cta.bulk_group [%out], [128], 64;"


@pytest.mark.parametrize("copy", [LOAD, STORE])
def test_bulk_copies_stay_inside(copy: str) -> None:
    launched(BULK + copy, 16)
    with pytest.raises(PtxError, match=r"64 bytes at 0x[0-9a-f]+: 4 bytes of them behind the end of 60 bytes at"):
        launched(BULK + copy, 15)


def test_what_belongs_to_the_launch_is_accessible() -> None:
    """Variables of the module, and the memory of a cooperative grid's barrier."""
    variables = ".global .align 4 .b32 numbers[2] = {7, 8}; .const .align 4 .b32 constant = 9;"
    body = """
        mov.u64 %rd1, numbers;
        ld.global.u32 %r1, [%rd1{offset}];
        ld.const.u32 %r2, [constant];
        st.global.u32 [%out], %r1;"""
    launched(body.replace("{offset}", "+4"), 32, before=variables)
    with pytest.raises(PtxError, match=r"4 bytes at 0x[0-9a-f]+: 0 bytes behind the end of 8 bytes at"):
        launched(body.replace("{offset}", "+8"), 32, before=variables)
    out = torch.zeros(32, dtype=torch.int32)
    grid = "mov.u32 %r1, %envreg2; mov.u32 %r2, %envreg1; mov.b64 %rd1, {%r1, %r2}; ld.global.u32 %r3, [%rd1+4];"
    module(grid).launch("k", 1, 32, out, cooperative=True, memory=[out])


def test_nothing_is_checked_without_ranges() -> None:
    out, other = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    store = module("st.global.u32 [%out], %r0;")
    store.launch("k", 1, 32, out)
    with pytest.raises(PtxError, match="bytes at"):
        store.launch("k", 1, 32, out, memory=[other])
    store.launch("k", 1, 32, out, memory=[other, out])
    assert out.tolist() == list(range(32))
