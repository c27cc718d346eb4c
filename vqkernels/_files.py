"""Files that are there whole or not at all: written beside their place under another name, then renamed.

Called by whatever here writes files: ``vqkernels.convert``, the models, training, ``vqkernels tune``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replace_file", "replacing", "sweep"]

# .NAME.MACHINE.PROCESS.tmp
TEMPORARY = re.compile(r"\..+\.([\w-]*)\.(\d+)\.tmp", re.DOTALL)
LONGEST_NAME = 255
# Whether a process of another machine still runs cannot be asked; nobody writes one file for so long.
SECONDS = 3600


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file to fill; at the end it is flushed to the disk and takes the place of ``path`` in one step.

    A file that was there keeps its permissions and, where the system lets us, its owner and group. A link stays one:
    the file that it leads to is replaced.

    Args:
        path: the final name.

    Raises:
        OSError: it cannot be written; what was there is untouched, and the error names ``path``.
    """
    final = Path(os.path.realpath(path))
    temporary = final.with_name(_temporary_name(final.name))
    try:
        old = final.stat() if final.exists() else None
        temporary.unlink(missing_ok=True)  # of a process that was killed and had our number
        # Nobody who could not read the old file may read the new one, not even for a moment.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if old is None else 0o600))
        mode = (old or temporary.stat()).st_mode
        yield temporary
        if old is not None:
            with contextlib.suppress(OSError):  # of another user
                os.chown(temporary, old.st_uid, old.st_gid)
        os.chmod(temporary, stat.S_IMODE(mode))  # safetensors has a file of its own in its place
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, final)
    except OSError as e:
        if e.errno is not None and e.filename in (None, str(temporary)):  # a full disk names no file
            raise OSError(e.errno, e.strerror, os.fspath(path)) from e
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step.

    Args:
        path: the final name; see :func:`replacing`.
        data: the whole content.

    Raises:
        OSError: it cannot be written; the old file, if any, is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left in a folder."""
    for file in folder.glob(".*.tmp"):
        if _abandoned(file):
            file.unlink(missing_ok=True)


def _machine() -> str:
    return re.sub(r"[^\w-]", "-", platform.node())


def _temporary_name(name: str) -> str:
    end = f".{_machine()}.{os.getpid()}.tmp"
    if len(os.fsencode(f".{name}{end}")) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}{end}"


def _abandoned(file: Path) -> bool:
    """Whether it is a temporary file of ours that nobody writes any more."""
    found = TEMPORARY.fullmatch(file.name)
    if found is None:
        return False
    machine, process = found.groups()
    try:
        if machine != _machine():
            return file.stat().st_mtime < time.time() - SECONDS
        os.kill(int(process), 0)
    except (FileNotFoundError, ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # of another user
        return False
    return int(process) == os.getpid()
