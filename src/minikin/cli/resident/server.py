"""The resident process: `python -m minikin.cli.resident.server SOCKET MINUTES`.

It imports everything that commands need and opens the embedded model, then forks for each command. It computes
nothing and has one thread, so that a fork can do all that a fresh process can.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minikin.cli.resident import command as messages
from minikin.cli.resident.command import Command

ASKING_S = 5.0  # seconds in which a client sends its command


def main(path: Path, minutes: float) -> None:
    """Listen at `path` until `minutes` have passed without a command, or `minikin stop` says so."""
    os.close(os.pidfd_open(os.getpid()))  # fails where the kernel is too old: then there is no such process
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # there is one
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))  # in a folder that only this user can enter
    listener.listen(64)
    threads = load()
    fork = Resident(listener, path, 60 * minutes).serve()
    os.close(lock)
    if fork:
        run(*fork, threads)


def load() -> int:
    """Import what commands use and open the embedded model; returns the number of threads for computing.

    Meanwhile one thread computes: the threads of OpenMP would not exist in a fork, which would wait for them.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looks for GPUs without a context, unusable in forks
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    from minikin.cli import app, commands, images  # noqa: F401
    from minikin.models.loading import registry

    app.command()
    registry.opened_before.append(registry.open_base("tiny", device="cpu"))
    gc.collect()
    gc.freeze()  # what the collector does not touch stays shared between the forks
    return threads


def run(command: Command, files: list[int], threads: int) -> None:
    """In a fork: be the command's process, to its end."""
    import torch

    from minikin.cli import app, display

    code: Any = 0
    try:
        messages.become(command, files)
        torch.set_num_threads(threads)
        display.out, display.err = display.consoles()
        app.main()
    except SystemExit as e:
        code = e.code
    except BaseException:  # under --debug
        sys.excepthook(*sys.exc_info())
        code = 1
    # as the interpreter's end, without taking apart what the kernel frees at once
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def _is_closed(connection: socket.socket) -> bool:
    """Whether the client waits no more, and has run the command itself."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(ASKING_S)


@dataclass
class Running:
    """A command in a fork."""

    process: int
    arguments: list[str]
    client: socket.socket
    since: float = field(default_factory=time.monotonic)


class Resident:
    """The loop of the resident process."""

    def __init__(self, listener: socket.socket, path: Path, idle_s: float) -> None:
        self.listener, self.path, self.idle_s = listener, path, idle_s
        self.events = selectors.DefaultSelector()
        self.events.register(listener, selectors.EVENT_READ)
        self.running: dict[int, Running] = {}  # by the descriptor of its process
        self.started = time.monotonic()

    def serve(self) -> tuple[Command, list[int]] | None:
        """Until this process is idle for long enough or stopped: None. In a fork: its command and files."""
        while self.listener.fileno() >= 0 or self.running:
            ready = self.events.select(None if self.running else self.idle_s)
            if not ready:
                self._close()
            for key, _ in ready:
                if key.fileobj is self.listener:
                    if fork := self._answer():
                        return fork
                elif key.fd in self.running:
                    self._ended(key.fd)
                else:
                    self._left(key.data)
        return None

    def _answer(self) -> tuple[Command, list[int]] | None:
        """What a client asks for. In a fork that is to run it: the command and its files."""
        files: list[int] = []
        try:
            connection, _ = self.listener.accept()
        except OSError:  # no descriptor is left, or the client has left
            return None
        connection.settimeout(ASKING_S)
        try:
            _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.getuid():
                raise PermissionError(user)
            message, files = messages.receive(connection)
            command = Command(**message)
            if command.do == "run" and not _is_closed(connection):
                return self._fork(command, files, connection)
            messages.send(connection, self._facts())
            if command.do == "stop":
                self._close()
        except (EOFError, OSError, TypeError, ValueError):
            pass  # a client that left, or none of ours
        for fd in files:
            os.close(fd)
        connection.close()
        return None

    def _fork(
        self, command: Command, files: list[int], connection: socket.socket
    ) -> tuple[Command, list[int]] | None:
        if not (process := os.fork()):
            self.events.close()
            self.listener.close()
            for other in (connection, *(r.client for r in self.running.values())):
                other.close()
            for fd in self.running:
                os.close(fd)
            return command, files
        try:
            watched = os.pidfd_open(process)
        except OSError:  # no descriptor is left: the client runs the command itself
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise
        while files:
            os.close(files.pop())
        self.running[watched] = Running(process, command.arguments, connection)
        self.events.register(watched, selectors.EVENT_READ)
        self.events.register(connection, selectors.EVENT_READ, watched)
        with contextlib.suppress(OSError):
            messages.send(connection, process)
        return None

    def _ended(self, watched: int) -> None:
        """A command's process ended: its client is told how."""
        ended = self.running.pop(watched)
        _, status = os.waitpid(ended.process, 0)
        self.events.unregister(watched)
        os.close(watched)
        with contextlib.suppress(KeyError):
            self.events.unregister(ended.client)
        with contextlib.suppress(OSError):
            messages.send(ended.client, status)
        ended.client.close()

    def _left(self, watched: int) -> None:
        """A client was killed: so is what it stood for."""
        if watched in self.running:
            self.events.unregister(self.running[watched].client)
            signal.pidfd_send_signal(watched, signal.SIGKILL)

    def _close(self) -> None:
        """No more commands; this process ends after those that run."""
        if self.listener.fileno() >= 0:
            self.events.unregister(self.listener)
            self.path.unlink(missing_ok=True)
            self.listener.close()

    def _facts(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "process": os.getpid(),
            "seconds": round(now - self.started),
            "idle_s": self.idle_s,
            "commands": [
                {"process": r.process, "seconds": round(now - r.since), "arguments": r.arguments}
                for r in self.running.values()
            ],
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
