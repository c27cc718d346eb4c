"""What orders the blocks of csrc/cuda's kernels, taken out of nvcc's PTX: the machine must find a race in the rest."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_host import build_ptx, run_hosted

HERE = Path(__file__).parent
ROUNDS = int(os.environ.get("VQKERNELS_EMULATE", "0"))
# Tests that reach the kernels with several blocks.
SCAN = ("hosted_nearest.py", "slices_of_a_scan and direct")
FEW = ("hosted_residual.py", "one_launch_in_every_order")


@dataclass(frozen=True)
class Mutant:
    """In a kernel, what a pattern finds is replaced; ``which`` of the places, from 0 on, or all."""

    kernel: str
    pattern: str
    replacement: str
    run: tuple[str, str]
    which: int | None = None
    always: bool = False  # not only by `make emulate ROUNDS=1`


MUTANTS = {
    "no fence before the ticket": Mutant("scan_rows", r"membar\.gl;", "", SCAN, 0, always=True),
    "no fence behind the ticket": Mutant("scan_rows", r"membar\.gl;", "", SCAN, 1, always=True),
    "a fence of the block": Mutant("scan_rows", r"membar\.gl;\n", "membar.cta;", SCAN, 0),
    "a ticket of the block": Mutant("scan_rows", r"atom\.global\.add\.u32", "atom.cta.add.u32", SCAN),
    "a grid barrier without release": Mutant("search_few", r"add\.release\.gpu", "add.relaxed.gpu", FEW, always=True),
    "a grid barrier without acquire": Mutant("search_few", r"ld\.acquire\.gpu", "ld.relaxed.gpu", FEW),
    "a grid barrier that one thread comes to": Mutant("search_few", r"barrier\.sync\s+0;(?=[^}]*?atom)", "", FEW),
    "one buffer for two levels": Mutant("search_few", r"(and\.b32\s+%r\d+, %r\d+), 1;", r"\1, 0;", FEW, always=True),
    "a list's counter of the block": Mutant(
        "collect", r"atom\.global\.add\.u32", "atom.cta.add.u32", ("hosted_nearest.py", "too_many_candidates and sm80")
    ),
    "a largest code of the block": Mutant(
        "pack_stats", r"atom\.global\.max\.s32", "atom.cta.max.s32", ("hosted_nearest.py", "every_row and sm80")
    ),
}


def mutated(library: Path, mutant: Mutant, into: Path) -> Path:
    """A copy of a library with other PTX of the same length."""
    data = library.read_bytes()
    changes = 0
    for kernel in re.finditer(rb"\.entry \w*%s\w*\(.*?(?=\n}\n)" % mutant.kernel.encode(), data, flags=re.S):
        found = list(re.finditer(mutant.pattern.encode(), kernel[0]))
        for match in found if mutant.which is None else found[mutant.which :][:1]:
            start, end = (kernel.start() + at for at in match.span())
            data = data[:start] + match.expand(mutant.replacement.encode()).ljust(end - start) + data[end:]
            changes += 1
    assert changes
    assert len(data) == library.stat().st_size
    into.write_bytes(data)
    return into


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant.always or ROUNDS])
def test_blocks_that_nothing_orders_are_noticed(name: str, tmp_path: Path) -> None:
    library, mutant = build_ptx("80"), MUTANTS[name]
    file, selected = mutant.run
    broken = mutated(library, mutant, tmp_path / library.name)
    with pytest.raises(AssertionError, match=rf"kernel \w*{mutant.kernel}\w*, .*: a race: this .* of global memory"):
        run_hosted(broken, "-x", "-p", "cuda_on_ptx", HERE / file, "-k", selected)
