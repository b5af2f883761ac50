"""Signals, terminals that go away, readers that leave, full disks: work is saved, exit codes are right."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minikin.perfusion import concept_file
from minikin.training import checkpoint as checkpoints
from minikin.training.config import StepContext
from minikin.training.signals import as_ctrl_c, interruptible
from minikin.training.trainer import Trainer

TEACH = ("--name", "tom", "--category", "cat", "--mode", "value", "--batch", "2", "--sample-every", "0",
         "--steps", "5000")  # fmt: skip
BROKEN_PIPE = 141


def minikin(*args: object, **how: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "minikin", *map(str, args)], env=env, text=True, **how)


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)],
    ids=["SIGTERM", "SIGHUP", "as a closed terminal and a shutdown send them"],
)
def test_signals_save_like_ctrl_c(
    signals: tuple[int, ...], photo_folder: Path, tmp_path: Path, cli: Any, monkeypatch: Any
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer, ctx: StepContext, *rest: Any) -> Any:
        if ctx.step == 2:
            for number in signals:
                os.kill(os.getpid(), number)
        return step(self, ctx, *rest)

    monkeypatch.setattr(Trainer, "step", interrupted)
    monkeypatch.setattr(signal, "SIG_IGN", object())  # however these tests were started
    assert cli("teach", photo_folder, *TEACH)[0] == 130
    assert checkpoints.read(tmp_path / "tom-teaching" / "checkpoint.safetensors")[1]["state"]["step"] == 3
    assert concept_file.load(tmp_path / "tom.safetensors").is_finite()


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with as_ctrl_c(), interruptible() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_outside_of_training_are_an_interruption() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            with pytest.raises(KeyboardInterrupt), as_ctrl_c():
                signal.raise_signal(number)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_closed_terminal_costs_no_work(photo_folder: Path, tmp_path: Path) -> None:
    """The window is closed: the terminal cannot be written to any more, and SIGHUP comes."""
    terminal, inside = pty.openpty()
    process = minikin(
        "teach", photo_folder, *TEACH, cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    os.close(inside)
    text = b""
    while b"teaching" not in text:
        text += os.read(terminal, 4096)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)  # as the kernel does to a session's leader
    assert process.wait(120) == 130
    assert concept_file.load(tmp_path / "tom.safetensors").is_finite()


@pytest.mark.slow
def test_a_reader_that_leaves_costs_no_work(photo_folder: Path, tmp_path: Path) -> None:
    process = minikin(
        "teach", photo_folder, *TEACH, "--json", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    while json.loads(process.stdout.readline()).get("stage") != "teaching":
        pass
    process.stdout.close()
    assert process.wait(120) == BROKEN_PIPE
    assert "Traceback" not in process.stderr.read()
    assert concept_file.load(tmp_path / "tom.safetensors").is_finite()


@pytest.mark.parametrize("command", ["--help", "--version"])
def test_standard_output_that_cannot_be_written(command: str) -> None:
    """`| head`: 141, without a word. A full disk: 7, with one message. Closed from the start: as /dev/null."""
    for stdout, code, lines in ((_left(), BROKEN_PIPE, 0), (os.open("/dev/full", os.O_WRONLY), 7, 1)):
        process = minikin(*command.split(), stdout=stdout, stderr=subprocess.PIPE)
        os.close(stdout)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, len(err.splitlines())) == (code, lines), err
        assert not lines or "standard output cannot be written: No space left" in err


def test_closed_streams(tmp_path: Path) -> None:
    run = f'"{sys.executable}" -m minikin --version'
    assert subprocess.run(["sh", "-c", f"{run} >&-"], capture_output=True).returncode == 0
    assert subprocess.run(["sh", "-c", f"{run} 2>&-"], capture_output=True).stdout.startswith(b"minikin")
    assert subprocess.run(["sh", "-c", f"{run} >&- 2>&- <&-"]).returncode == 0


def _left() -> int:
    """A pipe whose reader has left."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing
