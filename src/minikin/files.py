"""Writing files so that a crash, a full disk or a second process never leaves a torn one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from minikin.errors import Busy, StorageError

_PREFIX = ".minikin-"


def atomic_write(path: str | Path, data: bytes) -> Path:
    """Write all of `data` or nothing: temporary file, fsync, rename, fsync of the folder.

    Raises StorageError with the reason; an older file of that name survives.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=_PREFIX, dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as e:
        raise StorageError(_why(path, e)) from e
    finally:
        if temporary:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    return path


@contextmanager
def atomic_folder(path: Path, keep: int | None = None) -> Iterator[Path]:
    """A new folder to write into, which becomes `path` when all went well; an old `path` is replaced.

    keep  bytes that it and the folders beside it may hold, the newest first; for caches
    Raises StorageError with the reason.
    """
    import shutil

    fresh = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path.parent))
        fresh.chmod(path.parent.stat().st_mode & 0o777)  # a temporary folder is closed to others
        yield fresh
        for file in fresh.rglob("*"):
            _sync_folder(file)
        _swap(fresh, path)
        fresh = None
        _sync_folder(path.parent)
        if keep is not None:
            left = keep - folder_bytes(path)
            beside = [p for p in path.parent.iterdir() if p.is_dir() and not p.name.startswith(_PREFIX)]
            for old in sorted(set(beside) - {path}, key=lambda p: p.stat().st_mtime, reverse=True):
                left -= folder_bytes(old)
                if left < 0:
                    shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise StorageError(_why(path, e)) from e
    finally:
        if fresh:
            shutil.rmtree(fresh, ignore_errors=True)


def folder_bytes(path: Path) -> int:
    """What the files in a folder hold together."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _swap(fresh: Path, path: Path) -> None:
    """Put the folder `fresh` in the place of `path`; when that fails, the old one is back."""
    import shutil

    old = fresh.with_name(f"{fresh.name}-old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(fresh, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sweep_orphans(folder: Path, older_than_s: float = 3600) -> int:
    """Remove temporary files that a killed process left behind; how many."""
    import shutil
    import time

    n = 0
    for orphan in folder.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):
            if time.time() - orphan.stat().st_mtime > older_than_s:
                shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()
                n += 1
    return n


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold `path` as a lock while inside; raises Busy when another process holds it.

    The lock is the kernel's (flock), so it ends with the process, however that ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_orphans(path.parent)
        path.touch()
    except OSError as e:
        raise StorageError(_why(path, e)) from e
    with _held(path, what):
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                path.unlink()


def _held(path: Path, what: str) -> IO[str]:
    """The file of this name, locked; not one that its last holder removed after it was opened here."""
    import fcntl

    while True:
        handle = open(path, "a+")  # noqa: SIM115 - the caller closes it
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise Busy(
                f"Another process is already working on {what}. Wait for it, or choose another --out."
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                return handle
        handle.close()


def cache_folder() -> Path:
    """Where things are kept that can be made again: $MINIKIN_CACHE or the user's cache folder."""
    own = os.environ.get("MINIKIN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minikin"


def data_folder() -> Path:
    """Where the user's concepts and models live: $MINIKIN_HOME or the user's data folder."""
    own = os.environ.get("MINIKIN_HOME")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "minikin"


def _sync_folder(path: Path) -> None:
    """fsync of a folder or file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(path: Path, e: OSError) -> str:
    if e.errno == errno.ENOSPC:
        return f"{path} was not written: the disk is full. Free some space and try again; nothing was lost."
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} was not written: no right to write there. Choose another --out folder."
    return f"{path} was not written: {e.strerror or e}."


def save_image(image: Any, path: Path, info: Any = None) -> Path:
    """Write a picture as PNG, atomically; `info` are its text chunks."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return atomic_write(path, buffer.getvalue())
