"""Small PTX programs written by hand, for tests of the PTX machine."""

from __future__ import annotations

import torch
from ptx_machine import Module

# By the names that Triton has for them.
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "i8": torch.int8,
    "i32": torch.int32,
}


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
