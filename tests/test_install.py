"""What installing gives: a wheel for any Python, a pure one without a compiler, editable installs, loud refusals.

Builds run without isolation and environments borrow the installed torch through a .pth file, so nothing is downloaded;
`make test` itself installs under pip's default isolation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from clean_environment import ROOT, Environment, run

from vqkernels import _native

# Unoptimised where a test is about files and not about kernels: a third of the time.
DEBUG = "--config-settings=cmake.build-type=Debug"
FALSE = shutil.which("false") or "/bin/false"
BROKEN = {"CC": FALSE, "CXX": FALSE}
needs_compiler = pytest.mark.skipif(
    not os.environ.get("VQKERNELS_REQUIRE_NATIVE") and shutil.which("c++") is None, reason="no C++ compiler"
)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """`pip install .` where no compiler works."""
    environment = Environment(tmp_path_factory.mktemp("pure") / "environment")
    done = environment.install(ROOT, **BROKEN)
    assert "no working C++ compiler, installed without the native library" in done.stdout + done.stderr
    return environment


@pytest.mark.slow
@needs_compiler
def test_wheel_serves_every_python_and_carries_the_library(environment: Environment, tmp_path: Path) -> None:
    flags = (DEBUG, "--no-deps", "--no-index", "--no-build-isolation")
    environment.pip("wheel", *flags, "-w", tmp_path, ROOT, VQKERNELS_REQUIRE_NATIVE="1")
    (wheel,) = tmp_path.glob("*.whl")
    name, _, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("vqkernels", "py3", "none")
    assert platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")
    names = zipfile.ZipFile(wheel).namelist()
    assert "vqkernels/lib/libvqk_cpu.so" in names
    assert "vqkernels/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert all(top == "vqkernels" or top.endswith(".dist-info") for top in tops)
    assert not [name for name in names if name.endswith((".pyc", ".cpp", ".h"))]
    environment.install(wheel)
    found = environment.probe()
    assert found["reason"] is None
    assert found["library"] == str(environment.site / "vqkernels" / "lib" / "libvqk_cpu.so")


@pytest.mark.parametrize(
    ("variables", "line", "ok"),
    [
        ({"VQKERNELS_CUDA": "0"}, "vqkernels: no CUDA library: VQKERNELS_CUDA=0", True),
        ({"VQKERNELS_CUDA": "1", "PATH": "/nowhere"}, "vqkernels: no CUDA library: there is no nvcc", True),
        (
            {"VQKERNELS_CUDA": "1", "CUDACXX": FALSE, "VQKERNELS_REQUIRE_CUDA": "1"},
            "VQKERNELS_REQUIRE_CUDA is set",
            False,
        ),
    ],
    ids=["not wanted", "no nvcc", "required"],
)
def test_the_reason_for_no_cuda_library_is_one_line(
    tmp_path: Path, variables: dict[str, str], line: str, ok: bool
) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("there is no cmake")
    if Path("/usr/local/cuda/bin/nvcc").exists() and variables.get("PATH") == "/nowhere":
        pytest.skip("nvcc lies where it is looked for without a path")
    script = ROOT / "csrc" / "cuda" / "build.cmake"
    options = {"SOURCE": script.parent / "library", "BINARY": tmp_path, "GENERATOR": "Ninja", "CXX": "c++"}
    command = [cmake, *(f"-D{k}={v}" for k, v in options.items()), "-P", script]
    done = run(*command, cwd=tmp_path, ok=ok, **variables)
    assert line in " ".join((done.stdout + done.stderr).split())


@pytest.mark.slow
def test_broken_compiler_still_installs_and_says_so(pure: Environment) -> None:
    found = pure.probe()
    assert found["library"] is None
    assert "was not built" in str(found["reason"])
    assert str(found["file"]).startswith(str(pure.site))
    (metadata,) = pure.site.glob("vqkernels-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in metadata.read_text()
    table = run(pure.folder / "bin" / "vqkernels", "info", cwd=pure.folder).stdout
    assert "none: libvqk_cpu.so was not built (no working C++ compiler at install time" in table


@pytest.mark.slow
def test_pure_install_passes_the_reference_tests(pure: Environment) -> None:
    tests = [ROOT / "tests" / "ops" / f"test_{op}.py" for op in ("nearest", "lookup", "codebook_sum", "ema_update")]
    # What is about torch.compile, and many random shapes, is no matter of how the package was installed.
    chosen = ("-m", "not slow", "-k", "not opcheck and not any_shape")
    flags = ("-q", "-p", "no:cacheprovider", *chosen, "-c", ROOT / "pyproject.toml")
    kept = {"PYTHONPYCACHEPREFIX": sys.pycache_prefix or ""}  # bytecode is where this process has it
    done = run(pure.python, "-m", "pytest", *flags, *tests, cwd=pure.folder, **kept)
    closing = done.stdout.splitlines()[-1]
    assert " passed" in closing
    assert "failed" not in closing


@pytest.mark.slow
def test_explicit_native_says_why_it_is_missing(pure: Environment) -> None:
    call = "ops.nearest(torch.eye(2)[None, None], torch.eye(2)[None], backend='native')"
    script = f"import torch; from vqkernels import ops; {call}"
    done = run(pure.python, "-c", script, cwd=pure.folder, ok=False)
    assert "Unsupported: nearest: backend 'native' cannot run this call: libvqk_cpu.so was not built" in done.stderr


@pytest.mark.slow
def test_requiring_native_without_a_compiler_fails_clearly(environment: Environment) -> None:
    done = environment.install(ROOT, ok=False, VQKERNELS_REQUIRE_NATIVE="1", **BROKEN)
    text = done.stdout + done.stderr
    assert "the native library could not be built, and VQKERNELS_REQUIRE_NATIVE is set" in text
    assert not list(environment.site.glob("vqkernels*"))


@pytest.mark.slow
def test_pure_can_be_asked_for(environment: Environment) -> None:
    # A compiler that would fail the build is never started.
    environment.install(ROOT, VQKERNELS_PURE="1", VQKERNELS_REQUIRE_NATIVE="1", **BROKEN)
    assert "was not built" in str(environment.probe()["reason"])


@pytest.mark.slow
@needs_compiler
def test_editable_install_finds_its_library_and_a_broken_nvcc_costs_the_other_one_only(
    environment: Environment,
) -> None:
    # Both in one build, most of a minute: where a library goes and which ones are built are decided apart.
    done = environment.install(DEBUG, "-e", ROOT, VQKERNELS_REQUIRE_NATIVE="1", VQKERNELS_CUDA="1", CUDACXX=FALSE)
    assert f"vqkernels: no CUDA library: {FALSE} does not work" in done.stdout + done.stderr
    found = environment.probe()
    assert found["file"] == str(ROOT / "vqkernels" / "__init__.py")
    assert found["library"] == str(environment.site / "vqkernels" / "lib" / "libvqk_cpu.so")
    assert found["reason"] is None
    assert not list((environment.site / "vqkernels" / "lib").glob("libvqk_cuda*"))


def stub(folder: Path, code: str) -> Path:
    """A shared library made of ``code``."""
    (folder / "stub.c").write_text(code)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libvqk_cpu.so", "stub.c"], cwd=folder, check=True)
    return folder / "libvqk_cpu.so"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_loader_refuses_another_abi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stub(tmp_path, "int vqk_abi_version(void) { return 999; }")
    monkeypatch.setenv("VQKERNELS_LIBRARY", str(path))
    library, reason = _native._load.__wrapped__()
    assert library is None
    assert reason == f"libvqk_cpu.so has ABI version 999, this package needs {_native.ABI_VERSION}: install it again"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("int something_else;", "vqk_abi_version"),
        (f"int vqk_abi_version(void) {{ return {_native.ABI_VERSION}; }}", "vqk_last_error"),
    ],
)
def test_loader_refuses_a_library_without_the_functions(
    code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VQKERNELS_LIBRARY", str(stub(tmp_path, code)))
    library, reason = _native._load.__wrapped__()
    assert library is None
    assert expected in str(reason)


def test_loader_says_what_is_wrong_with_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "libvqk_cpu.so"
    for content in (None, b"not a library"):
        if content is not None:
            broken.write_bytes(content)
        monkeypatch.setenv("VQKERNELS_LIBRARY", str(broken))
        library, reason = _native._load.__wrapped__()
        assert library is None
        assert str(broken) in str(reason)
        assert [(r.levelname, str(reason) in r.getMessage()) for r in caplog.records] == [("WARNING", True)]
        caplog.clear()


def test_a_library_that_was_not_built_is_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("VQKERNELS_LIBRARY", raising=False)
    monkeypatch.setattr("vqkernels.__path__", [str(tmp_path)])
    library, reason = _native._load.__wrapped__()
    assert library is None
    assert "was not built" in str(reason)
    assert not caplog.records
