"""A command on its way to the resident process, and how a fork becomes the process that was asked for."""

from __future__ import annotations

import array
import io
import json
import os
import signal
import socket
import struct
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

LENGTH = struct.Struct("!I")
MOST = 16 << 20  # bytes of a message; Linux limits arguments and environment to less
if sys.platform != "win32":
    import resource

    LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
    IGNORABLE = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)  # as under nohup, or after `&`


@dataclass(frozen=True)
class Command:
    """Everything of a process that its program can notice, but for its files.

    do        run, list or stop
    niceness  0 is usual
    soft      soft limits, in the order of LIMITS
    ignored   signals that are ignored
    """

    do: str
    arguments: list[str]
    environment: dict[str, str]
    umask: int
    processors: list[int]
    niceness: int
    soft: list[int]
    ignored: list[int]

    @classmethod
    def mine(cls, do: str, arguments: list[str]) -> Command:
        """As this process would run it."""
        os.umask(umask := os.umask(0o077))
        return cls(
            do, arguments, dict(os.environ), umask, sorted(os.sched_getaffinity(0)), os.nice(0),
            [resource.getrlimit(limit)[0] for limit in LIMITS],
            [s for s in IGNORABLE if signal.getsignal(s) is signal.SIG_IGN],
        )  # fmt: skip


def send(connection: socket.socket, message: Any, files: list[int] | None = None) -> None:
    """One JSON message, with open files."""
    data = json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    connection.sendmsg([LENGTH.pack(len(data))], rights)
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message and its files. Raises EOFError when there is none, ValueError for one that is wrong."""
    head, files, _, _ = socket.recv_fds(connection, LENGTH.size, 8, socket.MSG_CMSG_CLOEXEC)
    head += _exactly(connection, LENGTH.size - len(head)) if head else b""
    if not head:
        raise EOFError
    (length,) = LENGTH.unpack(head)
    if length > MOST:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_exactly(connection, length)), files


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := connection.recv(count - len(data))):
            raise EOFError
        data += more
    return data


def fill_standard() -> None:
    """Open /dev/null in place of closed standard streams, before anything else takes their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def open_files() -> list[int]:
    """Standard input, output and error, and the working folder."""
    return [0, 1, 2, os.open(".", os.O_RDONLY | os.O_DIRECTORY)]


def become(command: Command, files: list[int]) -> None:
    """Make this process, a fork of the resident one, what the client was. `files` are those of `open_files`."""
    for fd, source in enumerate(files[:3]):
        os.dup2(source, fd)
    os.setsid()
    for number in IGNORABLE:
        signal.signal(number, signal.SIG_IGN if number in command.ignored else signal.SIG_DFL)
    if signal.SIGINT not in command.ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(command.environment)
    time.tzset()
    tempfile.tempdir = None
    os.umask(command.umask)
    with suppress(OSError):  # none of them may be used here
        os.sched_setaffinity(0, command.processors)
    os.nice(max(0, command.niceness - os.nice(0)))
    for limit, soft in zip(LIMITS, command.soft, strict=True):
        hard = resource.getrlimit(limit)[1]
        with suppress(ValueError, OSError):  # above what this process may have
            resource.setrlimit(limit, (soft, hard))
    os.fchdir(files[3])
    for fd in files:
        os.close(fd)
    sys.argv = ["minikin", *command.arguments]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - until the process ends
    sys.stdout, sys.stderr = _text(1, "strict"), _text(2, "backslashreplace")


def _text(fd: int, errors: str) -> io.TextIOWrapper:
    """A standard stream as Python makes it when it starts."""
    raw = open(fd, "wb", closefd=False)  # noqa: SIM115 - until the process ends
    encoding, _, handler = os.environ.get("PYTHONIOENCODING", "").partition(":")
    terminal = os.isatty(fd)
    return io.TextIOWrapper(
        raw, encoding or None, (handler if fd == 1 else "") or errors, line_buffering=terminal or fd == 2
    )


def as_message(command: Command) -> dict[str, Any]:
    return asdict(command)
