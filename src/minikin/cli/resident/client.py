"""A command that runs in the resident process, for the process that was asked for it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minikin.cli.resident import command

ANSWER_S = 30.0  # in which a resident process, which may be starting, takes a command
A_WEEK = 7 * 24 * 60.0  # minutes
MINUTES = 10.0  # without a command, after which the resident process ends
VARIABLE = "MINIKIN_RESIDENT"  # 0: none; another number: minutes instead of MINUTES
FLAG = "--no-resident"


def minutes(environment: Mapping[str, str]) -> float:
    """How long a resident process waits for another command; 0 where there shall be none."""
    text = environment.get(VARIABLE, str(MINUTES)).strip().lower()
    if sys.platform != "linux" or text in ("off", "no", "false"):
        return 0
    try:
        return min(A_WEEK, max(0.0, float(text)))
    except ValueError:
        return MINUTES


def run_there(path: Path, arguments: list[str]) -> int | None:
    """The wait status of the command, run by the resident process; None where there is none that runs it."""
    command.fill_standard()
    if not (connection := connected(path)):
        return None
    connection.settimeout(ANSWER_S)
    try:
        command.send(
            connection, command.as_message(command.Command.mine("run", arguments)), command.open_files()
        )
        process, _ = command.receive(connection)
    except (EOFError, OSError, ValueError):  # it ends just now, could not start, or hangs
        connection.close()
        return None
    except KeyboardInterrupt:
        print("\nminikin: interrupted.", file=sys.stderr)
        return 130 << 8
    pass_on_signals(process)
    connection.settimeout(None)
    try:
        status: int = command.receive(connection)[0]
    except (EOFError, OSError, ValueError):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)  # teaching saves what it has
        print(
            "minikin: the resident process was ended, so the command was told to end, too. Run it again "
            f"(teaching: with --resume); {FLAG} does without.", file=sys.stderr,
        )  # fmt: skip
        return 1 << 8
    return status


def connected(path: Path) -> socket.socket | None:
    """A connection to a process of this user, or None."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.getuid():
            return connection
    except OSError:
        pass
    connection.close()
    return None


def pass_on_signals(process: int) -> None:
    """What this process is told, the command is told: Ctrl-C, Ctrl-Z, kill, a closed terminal."""

    def tell(number: int, frame: Any = None) -> None:
        with suppress(ProcessLookupError):
            os.kill(process, number)

    def pause(number: int, frame: Any) -> None:
        tell(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # the shell has the terminal; goes on with its `fg`
        tell(signal.SIGCONT)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, tell)
    signal.signal(signal.SIGTSTP, pause)


def end_as(status: int) -> None:
    """End this process as the command's ended: with its exit code, or by its signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def start(path: Path, environment: dict[str, str]) -> None:
    """Start a resident process for the next command, in the environment that this one was started in."""
    import subprocess

    subprocess.Popen(
        [sys.executable, "-P", "-m", "minikin.cli.resident.server", str(path), str(minutes(environment))],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, cwd="/", env=environment,
    )  # fmt: skip
