"""Writing files so that a crash, a full disk or a second process never leaves a torn one."""

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
_TEMPORARY = re.compile(r"\.minikin-[0-9a-f]{16}(-old)?")  # what this module makes, and nobody else
SETTLED_S = 60.0  # a temporary file is locked at once after it is made; longer ago than that, it is


def atomic_write(path: str | Path, data: bytes) -> Path:
    """Write all of `data` or nothing: temporary file, fsync, rename, fsync of the folder.

    Raises StorageError with the reason; an older file of that name survives.
    """
    path = Path(path)
    _written(path, data, _replace)
    return path


def atomic_new(path: Path, data: bytes) -> bool:
    """As `atomic_write`, but the first writer wins: False, and nothing changed, when there is such a file.

    For names that say what is inside: a second process that made the same thing may come late.
    """
    return _written(path, data, _link)


def _replace(temporary: Path, path: Path) -> bool:
    os.replace(temporary, path)
    return True


def _link(temporary: Path, path: Path) -> bool:
    """Give a file a name that nothing has; False when something has it."""
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


def _written(path: Path, data: bytes, give_name: Callable[[Path, Path], bool]) -> bool:
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _new_file(path.parent)
        with os.fdopen(handle, "wb") as f:  # open until it has its name: the lock says that it is being written
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            named = give_name(temporary, path)
        if named:
            temporary = None
            _sync(path.parent)
    except OSError as e:
        raise _refused(path, e) from e
    finally:
        if temporary:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    return named


def move_into_place(finished: Path, path: Path) -> Path:
    """Give a file that was written over some time its name: fsync, rename, fsync of the folder.

    Both in one folder. Raises StorageError.
    """
    try:
        _sync(finished)
        os.replace(finished, path)
        _sync(path.parent)
    except OSError as e:
        raise _refused(path, e) from e
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
        raise _refused(path, e) from e
    finally:
        if fresh:
            shutil.rmtree(fresh, ignore_errors=True)


def read_small(path: Path, most: int) -> bytes | None:
    """A regular file's bytes; None when it has more than `most`, or is a pipe, a device or a folder.

    Never mapped into memory: another process may cut the file off at any time. Raises OSError.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe nobody writes to does not hold
    with os.fdopen(handle, "rb") as f:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            return None
        data = f.read(found.st_size + 1)
    return data if len(data) <= most else None


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


def sweep_orphans(folder: Path, settled_s: float = SETTLED_S) -> int:
    """Remove temporary files and folders that a killed process left behind in a folder; how many.

    settled_s  how old they must be; 0 for who holds a lock that keeps all others out of the folder

    Only what has a name that this module gives, belongs to this user, and no process holds: a writer's
    lock is the kernel's and ends with it. Whether the clock jumped does not matter to a writer at work.
    """
    import shutil
    import time

    n = 0
    for orphan in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            found = orphan.lstat()
            ours = _TEMPORARY.fullmatch(orphan.name) and found.st_uid == os.getuid()
            kind = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)  # never what a link points to
            young = settled_s > 0 and time.time() - found.st_mtime < settled_s
            if not ours or not kind or young or _is_held(orphan):
                continue
            shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()
            n += 1
    return n


def _new_name(folder: Path) -> Path:
    return folder / f"{_PREFIX}{secrets.token_hex(8)}"


def _new_file(folder: Path) -> tuple[int, Path]:
    """An empty temporary file, open and locked, with the rights that any new file of this user has."""
    path = _new_name(folder)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    _lock(handle)
    return handle, path


@contextmanager
def _being_written(handle: int) -> Iterator[None]:
    """Inside, what this handle is of is locked: a sweep leaves it alone."""
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    import fcntl

    with suppress(OSError):  # a file system without locks: then its age alone protects it
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    """Whether a process that is alive writes it."""
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
    """Hold `path` as a lock while inside; raises Busy when another process holds it.

    The lock is the kernel's (flock), so it ends with the process, however that ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_orphans(path.parent)
        path.touch()
    except OSError as e:
        raise _refused(path, e) from e
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


def _sync(path: Path) -> None:
    """fsync of a folder or file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused(path: Path, e: OSError) -> StorageError:
    full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return StorageError(_why(path, e), "storage_full" if full else "storage")


def _why(path: Path, e: OSError) -> str:
    if e.errno == errno.ENOSPC:
        return f"{path} was not written: the disk is full. Free some space and try again; nothing was lost."
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} was not written: no right to write there. Choose another --out folder."
    return f"{path} was not written: {e.strerror or e}."
