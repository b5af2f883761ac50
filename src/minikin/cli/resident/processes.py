"""The commands ps and stop: resident processes of this user."""

from __future__ import annotations

import sys
from typing import Any

from minikin.cli import display
from minikin.events import duration


def show(*, as_json: bool) -> None:
    """List the resident processes and the commands that they run."""
    processes = _answers("list")
    if as_json:
        display.emit({"resident": processes})
        return
    for facts in processes:
        commands = facts["commands"]
        display.out.print(
            f"process {facts['process']}, for {duration(facts['seconds'])}, "
            f"ends after {duration(facts['idle_s'])} without a command"
        )
        for c in commands:
            line = " ".join(("minikin", *c["arguments"]))
            display.out.print(f"  process {c['process']}, for {duration(c['seconds'])}: {line}")
    if not processes:
        display.out.print("No resident process. One starts after a command that paints or teaches (Linux).")


def stop(*, as_json: bool) -> None:
    """End the resident processes, after the commands that they run."""
    stopped = _answers("stop")
    if as_json:
        display.emit({"stopped": stopped})
        return
    for facts in stopped:
        n = len(facts["commands"])
        after = f", after {n} command{'s' if n > 1 else ''} that it runs" if n else ""
        display.out.print(f"process {facts['process']} ends{after}")
    if not stopped:
        display.out.print("No resident process.")


def _answers(what: str) -> list[dict[str, Any]]:
    """The answers of all resident processes of this user."""
    if sys.platform != "linux":
        return []
    from minikin.cli.resident import client, command, place

    answers = []
    parent = place.folder()
    for path in sorted(parent.glob("*.sock")) if parent else []:
        if connection := client.connected(path):
            with connection:
                connection.settimeout(client.ANSWER_S)
                try:
                    command.send(connection, command.as_message(command.Command.mine(what, [])))
                    answers.append(command.receive(connection)[0])
                except (EOFError, OSError, ValueError):  # it ended just now, or hangs
                    continue
    return answers
