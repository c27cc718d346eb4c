"""The wheel that `make wheel` builds: both libraries, honest tags, no trace of the machine, and it works elsewhere.

Built for one architecture to be quick. The environment that it goes into borrows torch and has no vqkernels of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from clean_environment import ROOT, Environment, run

TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
MISSING = [name for name in ("make", "c++", "nvcc", "patchelf") if shutil.which(name, path=TOOLS) is None]
MISSING += [name for name in ("auditwheel", "scikit_build_core") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"`make wheel` needs {', '.join(MISSING)} (dev extra, CUDA's toolkit)"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` writes, with the tools of the environment that the tests run in."""
    folder = tmp_path_factory.mktemp("wheel")
    ready = Path(sys.prefix) / ".dev"
    command = ["make", "-o", ready, "wheel", f"VENV={sys.prefix}", f"WHEELS={folder / 'built'}", f"DIST={folder}"]
    run(*command, cwd=ROOT, VQKERNELS_CUDA="1", VQKERNELS_REQUIRE_CUDA="1", VQKERNELS_CUDA_ARCHS="80-real")
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def libraries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The shared libraries in it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".so" in name]
        return [Path(archive.extract(name, folder)) for name in names]


def test_tags_say_any_python_and_an_old_linux(wheel: Path) -> None:
    name, _, python, abi, platforms = wheel.stem.split("-")
    assert (name, python, abi) == ("vqkernels", "py3", "none")
    assert all(re.fullmatch(r"manylinux(_2_\d+|20\d\d)_\w+", tag) for tag in platforms.split("."))
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        lines = archive.read(path).decode().splitlines()
    assert "Root-Is-Purelib: false" in lines
    tags = {line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")}
    assert tags == {f"py3-none-{tag}" for tag in platforms.split(".")}


def test_it_holds_both_libraries_and_nothing_of_anyone_else(wheel: Path, libraries: list[Path]) -> None:
    stems = sorted(re.sub(r"\d+", "<major>", path.name) for path in libraries)
    assert stems == ["libvqk_cpu.so", "libvqk_cuda<major>.so"]
    assert {path.parent.name for path in libraries} == {"lib"}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"vqkernels", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if name.endswith((".pyc", ".cpp", ".h", ".cu", ".cuh", ".tmp"))]
    assert "vqkernels/tuned/__init__.py" in names
    assert wheel.stat().st_size < 20 * 2**20


def test_libraries_do_not_remember_where_they_were_built(libraries: list[Path], wheel: Path) -> None:
    for path in libraries:
        content = path.read_bytes()
        for trace in (str(ROOT), str(Path.home()) + "/", str(wheel.parent), "/tmp/"):
            assert trace.encode() not in content, f"{path.name} contains {trace}"
        if shutil.which("readelf") is not None:
            listing = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
            searched = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", listing)
            assert all(part.startswith("$ORIGIN") for found in searched for part in found.split(":")), searched


# CPU only: nothing may load the CUDA library before it is asked for, and then it must load without a driver.
SEARCH = """
import json, torch, vqkernels
from vqkernels import _cuda, _native
from vqkernels.testing import oracle_nearest
assert not torch.cuda.is_available()
torch.manual_seed(0)
x, codes = torch.randn(63, 20), torch.randn(257, 20)
indices, score = vqkernels.nearest(x, codes, backend="native")
exact = indices.equal(oracle_nearest(x, codes)[0])
vq = vqkernels.VectorQuantizer(17, 6, decay=0.9)
before = vq.codebook.detach().clone()
z = torch.randn(2, 6, 5, 3, requires_grad=True)
out = vq(z)
(out.quantized.square().mean() + out.loss).backward()
trained = bool(torch.isfinite(z.grad).all()) and not vq.codebook.equal(before)
untouched = "libvqk_cuda" not in open("/proc/self/maps").read()
info = vqkernels.info()
library = _cuda.lib()
print(json.dumps({
    "file": vqkernels.__file__, "exact": exact, "trained": trained, "untouched": untouched, "info": info.to_dict(),
    "text": str(info), "cpu": _native.lib()._name, "cuda": library._name, "build": library.vqk_build_info().decode(),
}))
"""


def test_it_installs_into_a_clean_environment_and_searches_there(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.install(wheel)
    done = run(environment.python, "-c", SEARCH, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    found = json.loads(done.stdout)
    home = environment.site / "vqkernels"
    assert found["file"] == str(home / "__init__.py")
    assert (found["exact"], found["trained"], found["untouched"]) == (True, True, True)
    assert found["cpu"] == str(home / "lib" / "libvqk_cpu.so")
    assert Path(found["cuda"]).parent == home / "lib"
    assert "80-real" in found["build"]
    assert found["info"]["cuda"]["library"] == Path(found["cuda"]).name
    assert found["info"]["cuda"]["reason"]
    assert re.search(rf"cuda library +{Path(found['cuda']).name}", found["text"])
    script = run(environment.folder / "bin" / "vqkernels", "info", cwd=tmp_path, CUDA_VISIBLE_DEVICES="").stdout
    assert Path(found["cuda"]).name in script
