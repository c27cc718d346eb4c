"""Files are replaced in one step: permissions and links stay, errors name the file, leftovers go."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
import torch

from tests.full_disk import full_disk
from vqkernels import _files
from vqkernels._files import replace_file, replacing, sweep
from vqkernels.convert import convert_file

STATE = {"quantize.embedding.weight": torch.arange(600.0).view(100, 6)}
NOBODY = 2**30  # more than a process can have as its number


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_converting_in_place_keeps_permissions_and_follows_the_link(ending: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / f"secret{ending}", tmp_path / f"model{ending}"
    torch.save(STATE, tmp_path / "in.pt")
    convert_file(tmp_path / "in.pt", real, "taming")
    assert mode(real) == 0o666 & ~_umask()
    real.chmod(0o600)
    link.symlink_to(Path("store") / real.name)
    convert_file(link, link, "dac")
    assert link.is_symlink()
    assert mode(real) == 0o600
    assert [p.name for p in (tmp_path / "store").iterdir()] == [real.name]
    convert_file(real, tmp_path / "back.pt", "taming")
    assert torch.equal(
        torch.load(tmp_path / "back.pt", weights_only=True)[next(iter(STATE))], next(iter(STATE.values()))
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_new_file_can_be_read_by_nobody_who_could_not_read_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with replacing(path) as temporary:
        assert mode(temporary) == 0o600
        temporary.write_bytes(b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", 0o640)


def test_a_link_that_leads_nowhere_is_filled(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_full_disk_is_an_error_that_names_the_file(ending: str, tmp_path: Path) -> None:
    path, target = tmp_path / "file", tmp_path / f"out{ending}"
    path.write_bytes(b"old")
    torch.save(STATE, tmp_path / "in.pt")
    with full_disk(1000):
        with pytest.raises(OSError, match=r"/file'$"):
            replace_file(path, b"new" * 1000)
        with pytest.raises(OSError, match=rf"/out{ending}"):
            convert_file(tmp_path / "in.pt", target, "dac")
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "in.pt"]


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/none/file'$"):
        replace_file(tmp_path / "none" / "file", b"")


def test_names_may_be_as_long_as_the_system_has_them(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 125 + ".png")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    with replacing(path) as temporary:
        assert temporary.name.endswith(f".{os.getpid()}.tmp")


def test_the_name_of_the_temporary_file_is_not_in_what_torch_writes(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "in.pt")
    convert_file(tmp_path / "in.pt", tmp_path / "a.pt", "dac")
    convert_file(tmp_path / "in.pt", tmp_path / "b.pt", "dac")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    here = _files._machine()
    gone = [f".a.json.{here}.{NOBODY}.tmp", f".b.{here}.{os.getpid()}.tmp", ".c.png.elsewhere.7.tmp"]
    kept = [
        f".a.json.{here}.{os.getppid()}.tmp",  # is being written
        f".d.elsewhere.{NOBODY}.tmp",  # on another machine, as far as anybody knows
        ".backup.tmp",
        ".notes.2024.tmp",
        f"a.{here}.{NOBODY}.tmp",
    ]
    for name in [*gone, *kept]:
        (tmp_path / name).write_text("")
    old = time.time() - 2 * _files.SECONDS
    os.utime(tmp_path / gone[2], (old, old))
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
