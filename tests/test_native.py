"""csrc/capi.h, the ctypes declarations and the built library agree; pool and instruction sets are what they say."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch

from vqkernels import _cuda, _native, ops

HEADER = (Path(__file__).resolve().parents[1] / "csrc" / "capi.h").read_text()
CODE = re.sub(r"//[^\n]*|/\*.*?\*/", "", HEADER, flags=re.S)

SCALARS: dict[str, Any] = {
    "void": None,
    "int32_t": c_int32,
    "int64_t": c_int64,
    "uint64_t": c_uint64,
    "double": c_double,
    "float": c_float,
}
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "vqk_rows": _native.Rows,
    "vqk_codes": _native.Codes,
    "vqk_cuda_search_plan": _cuda.SearchPlan,
}


@pytest.fixture
def library() -> ctypes.CDLL:
    if (reason := _native.unavailable()) is None:
        return _native.lib()
    if os.environ.get("VQKERNELS_REQUIRE_NATIVE"):
        pytest.fail(f"VQKERNELS_REQUIRE_NATIVE is set, and the native library is missing: {reason}")
    pytest.skip(reason)


def c_type(text: str) -> Any:
    """The ctypes counterpart of a C type as capi.h spells it."""
    words = text.replace("const", " ").replace("*", " * ").split()
    name, pointers = words[0], words.count("*")
    if name == "vqk_parallel_for" or (name == "void" and pointers == 1):
        return c_void_p
    if name == "char" and pointers == 1:
        return c_char_p
    if name == "void" and pointers == 2:
        return POINTER(c_void_p)
    if pointers == 1:
        return POINTER(STRUCTS.get(name) or SCALARS[name])
    assert pointers == 0
    return SCALARS[name]


def parameter_type(text: str) -> Any:
    return c_type(re.sub(r"\w+\s*$", "", text.strip()))


def header_functions() -> dict[str, tuple[Any, list[Any]]]:
    found = {}
    for result, name, parameters in re.findall(r"VQK_API\s+([\w\s]+?[\s*]+)(vqk_\w+)\(([^)]*)\);", CODE):
        arguments = [] if parameters.strip() == "void" else [parameter_type(p) for p in parameters.split(",")]
        found[name] = (c_type(result), arguments)
    return found


def header_enum(name: str) -> dict[str, int]:
    match = re.search(rf"enum {name} {{([^}}]*)}}", CODE)
    assert match is not None
    return {key: int(value) for key, value in re.findall(r"VQK_(\w+)\s*=\s*(\d+)", match[1])}


def test_header_is_parsed_completely() -> None:
    assert len(header_functions()) == len(re.findall(r"^VQK_API ", HEADER, flags=re.M)) > 10


def test_functions_match_the_ctypes_tables() -> None:
    header = header_functions()
    assert header == _native.SIGNATURES | _cuda.SIGNATURES
    assert {n for n in header if not n.startswith("vqk_cuda_")} == set(_native.SIGNATURES)
    assert {n for n in header if n.startswith("vqk_cuda_")} <= set(_cuda.SIGNATURES)


def exported(path: str) -> set[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run([nm, "-D", "--defined-only", path], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines() if " T " in line}
    return {s for s in symbols if s.startswith("vqk")}


def test_functions_match_the_exported_symbols(library: ctypes.CDLL) -> None:
    assert exported(library._name) == set(_native.SIGNATURES)


def test_functions_match_the_exported_symbols_of_the_cuda_library() -> None:
    try:
        path = _cuda.path()
    except OSError as e:
        if os.environ.get("VQKERNELS_REQUIRE_CUDA"):
            pytest.fail(f"VQKERNELS_REQUIRE_CUDA is set, and {e}")
        pytest.skip(str(e))
    assert exported(str(path)) == set(_cuda.SIGNATURES)


def test_library_needs_neither_torch_nor_python_nor_openmp(library: ctypes.CDLL) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    listing = subprocess.run([readelf, "-d", library._name], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[([^\]]+)\]", listing)
    assert needed
    assert not [name for name in needed if not re.match(r"(libc|libm|libpthread|libdl|ld-linux[\w-]*)\.so", name)]


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_fields_match_the_header(name: str) -> None:
    match = re.search(rf"typedef struct {name} {{(.*?)}} {name};", CODE, flags=re.S)
    assert match is not None
    expected = []
    for declaration in filter(None, (d.strip() for d in match[1].split(";"))):
        parts = re.fullmatch(r"(.*?[\s*])(\w+)(?:\[(\d+)\])?", declaration)
        assert parts is not None
        base = c_type(parts[1])
        expected.append((parts[2], base * int(parts[3]) if parts[3] else base))
    assert list(STRUCTS[name]._fields_) == expected


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_struct_layouts_match_the_compiler(tmp_path: Path) -> None:
    lines = [f'printf("%zu\\n", sizeof({s}));' for s in STRUCTS]
    lines += [f'printf("%zu\\n", offsetof({s}, {f[0]}));' for s, c in STRUCTS.items() for f in c._fields_]
    # capi.h declares C++ linkage; a C compiler only needs the word gone.
    source = HEADER.replace('extern "C" ', "")
    (tmp_path / "capi.h").write_text(source)
    (tmp_path / "layout.c").write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "capi.h"\nint main(void) {' + "".join(lines) + "return 0;}"
    )
    subprocess.run(["cc", "-o", "layout", "layout.c"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout.split()
    expected = [ctypes.sizeof(c) for c in STRUCTS.values()]
    expected += [getattr(c, f[0]).offset for c in STRUCTS.values() for f in c._fields_]
    assert [int(n) for n in printed] == expected


def test_enums_match_the_header() -> None:
    assert header_enum("vqk_isa") == {name.upper(): i for i, name in enumerate(_native.ISAS)}
    assert header_enum("vqk_metric") == {name.upper(): i for name, i in _native.METRICS.items()}
    assert header_enum("vqk_precision") == {name.upper(): i for name, i in _native.PRECISIONS.items()}
    assert header_enum("vqk_gradient") == {name.upper(): i for name, i in _native.GRADIENTS.items()}
    names = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
    assert header_enum("vqk_dtype") == {names[dtype]: i for dtype, i in _native.DTYPES.items()}
    assert header_enum("vqk_status") == {"OK": 0, "INVALID": 1, "NO_MEMORY": 2, "UNSUPPORTED": 3, "INTERNAL": 4}


def test_abi_version_is_the_same_everywhere(library: ctypes.CDLL) -> None:
    match = re.search(r"#define VQK_ABI_VERSION (\d+)", HEADER)
    assert match is not None
    assert int(match[1]) == _native.ABI_VERSION == library.vqk_abi_version()


def test_statuses_become_the_right_exceptions(library: ctypes.CDLL) -> None:
    _native.check(0)
    for status, error in ((1, ValueError), (2, MemoryError), (3, RuntimeError), (4, RuntimeError)):
        with pytest.raises(error, match=r"^vqkernels: "):
            _native.check(status)


BODY = ctypes.CFUNCTYPE(None, c_int64, c_int64, c_void_p)
PARALLEL_FOR = ctypes.CFUNCTYPE(c_int32, c_int64, c_int64, c_int64, BODY, c_void_p)


@pytest.fixture
def pool_calls(library: ctypes.CDLL) -> Iterator[list[tuple[int, int]]]:
    """Every call that the library makes to the thread pool, which runs it in two halves, last one first."""
    calls: list[tuple[int, int]] = []

    def spy(begin: int, end: int, grain: int, body: Any, context: int) -> int:
        calls.append((begin, end))
        middle = (begin + end) // 2
        for part in ((middle, end), (begin, middle)):
            body(*part, context)
        return 0

    callback = PARALLEL_FOR(spy)
    threads = torch.get_num_threads()
    library.vqk_cpu_set_parallel_for(ctypes.cast(callback, c_void_p))
    yield calls
    library.vqk_cpu_set_parallel_for(_native._torch_parallel_for())
    torch.set_num_threads(threads)


def test_torch_exports_its_thread_pool() -> None:
    # A null pointer would mean that everything runs on one thread, silently.
    assert _native._torch_parallel_for()


def test_kernels_run_on_the_pool_that_was_handed_over(pool_calls: list[tuple[int, int]]) -> None:
    x, codebook = torch.randn(1, 1, 4099, 16), torch.randn(1, 257, 16)
    torch.set_num_threads(2)
    split = ops.nearest(x, codebook, backend="native")
    assert pool_calls
    pool_calls.clear()
    torch.set_num_threads(1)
    whole = ops.nearest(x, codebook, backend="native")
    assert not pool_calls, "torch.set_num_threads(1) must keep the library serial"
    assert torch.equal(split[0], whole[0])
    assert torch.equal(split[1], whole[1])


def test_every_instruction_set_can_be_forced(library: ctypes.CDLL, isa: str) -> None:
    assert _native.ISAS[_native.isa()] == isa


def test_automatic_instruction_set_is_one_that_runs(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scalar" in _native.supported()
    for value in ("", "auto"):
        monkeypatch.setenv("VQKERNELS_ISA", value)
        assert _native.ISAS[_native.isa()] in _native.supported()
    monkeypatch.delenv("VQKERNELS_ISA")
    assert _native.isa() == library.vqk_cpu_best_isa()
    assert [library.vqk_cpu_has_isa(i) for i in (-1, len(_native.ISAS), 99)] == [0, 0, 0]


def test_unknown_instruction_set_is_an_error(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_ISA", "sse9")
    with pytest.raises(ValueError, match=r"VQKERNELS_ISA is 'sse9'; expected one of scalar, avx2, avx512"):
        ops.nearest(torch.zeros(1, 1, 2, 3), torch.zeros(1, 4, 3), backend="native")


def test_instruction_set_of_another_machine_is_an_error(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "vqk_cpu_has_isa", lambda i: int(i == 0))
    monkeypatch.setenv("VQKERNELS_ISA", "amx")
    with pytest.raises(ValueError, match=r"'amx', which this machine or build cannot run; it has \['scalar'\]"):
        _native.isa()
