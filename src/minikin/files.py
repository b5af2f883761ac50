"""Crash-safe writing: a crash, a full disk or a second process never leaves a partial file."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from minikin.errors import Busy, StorageError

_PREFIX = ".minikin-"
_TEMPORARY = re.compile(r"\.minikin-[0-9a-f]{16}(-old)?")  # only this module makes such names
MIN_ORPHAN_AGE_S = 60.0  # a younger temporary file may not be locked yet


def atomic_write(path: str | Path, data: bytes) -> Path:
    """Write all of `data` or nothing: temporary file, fsync, rename, fsync of the folder.

    Raises StorageError with the reason; an older file of that name survives.
    """
    path = Path(path)
    _write(path, data, _replace)
    return path


def atomic_new(path: Path, data: bytes) -> bool:
    """Write like `atomic_write` unless the file exists: returns False, and changes nothing, if it does.

    For names that are hashes of the content: a second process may write the same file later.
    """
    return _write(path, data, _link)


def _replace(temporary: Path, path: Path) -> bool:
    os.replace(temporary, path)
    return True


def _link(temporary: Path, path: Path) -> bool:
    """Rename a file to a name that does not exist; False if it exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return not path.exists() and _replace(temporary, path)  # a file system without hard links
    os.unlink(temporary)
    return True


def _write(path: Path, data: bytes, give_name: Callable[[Path, Path], bool]) -> bool:
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _new_file(path.parent)
        with os.fdopen(handle, "wb") as f:  # open until it is renamed: the lock marks it as being written
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            renamed = give_name(temporary, path)
        if renamed:
            temporary = None
            _sync(path.parent)
    except OSError as e:
        raise _storage_error(path, e) from e
    finally:
        if temporary:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    return renamed


def move_into_place(finished: Path, path: Path) -> Path:
    """Rename a finished file, for example a download: fsync, rename, fsync of the folder.

    Both paths are in one folder. Raises StorageError.
    """
    try:
        _sync(finished)
        os.replace(finished, path)
        _sync(path.parent)
    except OSError as e:
        raise _storage_error(path, e) from e
    return path


@contextmanager
def atomic_folder(path: Path, keep: int | None = None) -> Iterator[Path]:
    """Write a folder atomically: yields a temporary folder that replaces `path` at the end.

    keep  for caches: bytes that `path` and the folders beside it may take together; the oldest are removed
    Raises StorageError with the reason.
    """
    import shutil

    fresh = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = _new_name(path.parent)
        fresh.mkdir()
        with _being_written(os.open(fresh, os.O_RDONLY)):
            yield fresh
            for file in fresh.rglob("*"):
                _sync(file)
            _sync(fresh)
            _swap(fresh, path)
        fresh = None
        _sync(path.parent)
        if keep is not None:
            left = keep - folder_bytes(path)
            beside = [p for p in path.parent.iterdir() if p.is_dir() and not p.name.startswith(_PREFIX)]
            for old in sorted(set(beside) - {path}, key=lambda p: p.stat().st_mtime, reverse=True):
                left -= folder_bytes(old)
                if left < 0:
                    shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise _storage_error(path, e) from e
    finally:
        if fresh:
            shutil.rmtree(fresh, ignore_errors=True)


def read_small(path: Path, most: int) -> bytes | None:
    """Bytes of a regular file; None if it has more than `most`, or is a pipe, a device or a folder.

    The file is not memory-mapped: another process may truncate it at any time. Raises OSError.
    """
    handle = os.open(
        path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    )  # O_NONBLOCK: a pipe without a writer does not block
    with os.fdopen(handle, "rb") as f:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            return None
        data = f.read(status.st_size + 1)
    return data if len(data) <= most else None


def is_unicode(name: str) -> bool:
    """Whether a file's name is valid UTF-8: no database, response or terminal takes another."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def folder_bytes(path: Path) -> int:
    """Total size of the files in a folder in bytes."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _swap(fresh: Path, path: Path) -> None:
    """Replace the folder `path` by `fresh`; if that fails, the old folder is restored."""
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


def sweep_orphans(folder: Path, min_age_s: float = MIN_ORPHAN_AGE_S) -> int:
    """Remove temporary files and folders that a killed process left in a folder; returns their number.

    min_age_s  minimum age in seconds; 0 if the caller holds a lock that keeps all other writers out

    Removes only entries with a name of this module that belong to this user and that no process has locked. A
    writer's flock ends with its process, so a jump of the clock does not matter to a running writer.
    """
    import shutil
    import time

    n = 0
    for orphan in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            status = orphan.lstat()
            ours = _TEMPORARY.fullmatch(orphan.name) and status.st_uid == os.getuid()
            is_file_or_folder = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)  # not a link
            is_young = min_age_s > 0 and time.time() - status.st_mtime < min_age_s
            if not ours or not is_file_or_folder or is_young or _is_held(orphan):
                continue
            shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()
            n += 1
    return n


def _new_name(folder: Path) -> Path:
    return folder / f"{_PREFIX}{secrets.token_hex(8)}"


def _new_file(folder: Path) -> tuple[int, Path]:
    """An empty temporary file, open and locked, with the permissions of any new file of this user."""
    path = _new_name(folder)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    _lock(handle)
    return handle, path


@contextmanager
def _being_written(handle: int) -> Iterator[None]:
    """Lock this open folder or file while inside, so that `sweep_orphans` skips it; closes it at the end."""
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    import fcntl

    with suppress(OSError):  # on a file system without locks its age alone protects it
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    """True if a running process has locked it."""
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while inside. Raises Busy if another process holds it.

    The lock is an flock of the kernel, so it ends with the process.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_orphans(path.parent)
        path.touch()
    except OSError as e:
        raise _storage_error(path, e) from e
    with _open_locked(path, what):
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                path.unlink()


def _open_locked(path: Path, what: str) -> IO[str]:
    """Open and lock the file; retries if its last holder removed it in between. Raises Busy."""
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
    """Folder of everything that can be computed again: $MINIKIN_CACHE or the user's cache folder."""
    if folder := os.environ.get("MINIKIN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minikin"


def data_folder() -> Path:
    """Folder of the user's concepts and models: $MINIKIN_HOME or the user's data folder."""
    if folder := os.environ.get("MINIKIN_HOME"):
        return Path(folder)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "minikin"


def _sync(path: Path) -> None:
    """fsync of a folder or file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _storage_error(path: Path, e: OSError) -> StorageError:
    full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return StorageError(_why(path, e), "storage_full" if full else "storage")


def _why(path: Path, e: OSError) -> str:
    if e.errno == errno.ENOSPC:
        return f"{path} was not written: the disk is full. Free some space and try again; nothing was lost."
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} was not written: no right to write there. Choose another --out folder."
    return f"{path} was not written: {e.strerror or e}."
