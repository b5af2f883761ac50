"""SIGKILL at random moments: one harness for all long work that can be continued.

    problems = Kills(WORKS["teach"], folder, seed=0).run(20)

The work runs in a process that is killed at a moment drawn from the seed, again and again; each next process
continues it. After every kill no file may be torn, and at most one interval of steps may be lost. The final
result must be that of a run that was never killed.

Processes are forked from one server that has imported everything once (multiprocessing's forkserver).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from minikin import files

Begin = Callable[[Path, Any], None]


@dataclass(frozen=True)
class Work:
    """Long work that may be killed.

    begin     does the work in a folder, or continues it; writes the number of steps done into a counter
    saved     how many steps a folder holds safely
    result    the result as text or a digest; compared with that of an uninterrupted run
    interval  steps between two saves
    """

    begin: Begin
    saved: Callable[[Path], int]
    result: Callable[[Path], str]
    interval: int = 1


@dataclass
class Kills:
    """Kills one work again and again; `run` returns what went wrong."""

    work: Work
    folder: Path
    seed: int = 0
    killed: int = 0
    early: int = 0  # processes that had finished before their moment came
    worst: int = 0  # most steps lost by one kill
    problems: list[str] = field(default_factory=list)

    def run(self, kills: int) -> list[str]:
        """Kill so often; the problems, [] for none."""
        rng = random.Random(self.seed)
        whole = self.folder / "whole"
        whole.mkdir(parents=True)
        code, _, seconds = _run_process(self.work, whole, None)
        if code != 0:
            return [f"the uninterrupted run ended with {code}"]
        expected, number = self.work.result(whole), 0
        while self.killed < kills and not self.problems:
            part = self.folder / f"part{number}"
            part.mkdir()
            number += 1
            for _ in range(rng.randint(1, 4)):
                if self.killed < kills and not self._kill(part, rng.uniform(0, 0.7 * seconds)):
                    break
            code, *_ = _run_process(self.work, part, None)
            if code != 0:
                self.problems.append(f"the continuation after {self.killed} kills ended with {code}")
            elif self.work.result(part) != expected:
                self.problems.append(f"after {self.killed} kills the result is another one")
            self._sweep(part)
        return self.problems

    def _kill(self, part: Path, after: float) -> bool:
        """Begin, kill, check; False when the work had finished before."""
        code, done, _ = _run_process(self.work, part, after)
        if code == 0:
            self.early += 1
            return False
        if code != -signal.SIGKILL:
            self.problems.append(f"a process ended by itself with {code}")
            return False
        self.killed += 1
        self.problems += torn(part)
        lost = done - self.work.saved(part)
        self.worst = max(self.worst, lost)
        if lost > self.work.interval:
            self.problems.append(f"{lost} steps were lost; at most {self.work.interval} may be")
        return not self.problems

    def _sweep(self, part: Path) -> None:
        """Temporary files of killed processes are removed by the next one (here: of any age)."""
        for folder in [part, *(p for p in part.rglob("*") if p.is_dir())]:
            if folder.is_dir():
                files.sweep_orphans(folder, min_age_s=0)
        self.problems += [f"{p.name} was left behind" for p in part.rglob(".minikin-*")]


@cache
def forking() -> Any:
    """The context of processes that are forked from one that has imported everything, with one thread each."""
    root = str(Path(__file__).parents[2])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.killed"])
    with pytest.MonkeyPatch.context() as patch:
        places = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        patch.setenv("PYTHONPATH", os.pathsep.join(dict.fromkeys(places)))
        patch.setenv("MINIKIN_KILLS", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _run_process(work: Work, folder: Path, after: float | None) -> tuple[int, int, float]:
    """Exit code, steps done and seconds of work of one process; killed `after` seconds of work, or never.

    Time counts from the work's sign that it has begun: starting the server and the first process takes longer.
    """
    done = forking().Value("q", -1, lock=False)
    process = forking().Process(target=work.begin, args=(folder, done))
    process.start()
    while done.value < 0 and process.is_alive():
        time.sleep(0.002)
    start = time.monotonic()
    if after is not None:
        process.join(after)
        process.kill()
    process.join()
    seconds = time.monotonic() - start
    code, steps = process.exitcode, done.value
    process.close()
    assert code is not None
    return code, max(0, steps), seconds


def torn(folder: Path) -> list[str]:
    """Files that are incomplete; temporary ones and a log's last line do not count."""
    problems = []
    for path in folder.rglob("*"):
        if not path.is_file() or any(p.startswith(".minikin-") for p in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix in (".png", ".jpg"):
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".jsonl":
                for line in path.read_bytes().split(b"\n")[:-1]:
                    json.loads(line)
        except (OSError, ValueError, SyntaxError, SafetensorError) as e:
            problems.append(f"{path.name} is torn: {e}")
    return problems


def digest(path: Path) -> str:
    """SHA-256 of a safetensors file's tensors; its metadata may have times."""
    sha256 = hashlib.sha256()
    for name, values in sorted(load_file(path).items()):
        sha256.update(name.encode() + str(values.shape).encode() + values.tobytes())
    return sha256.hexdigest()
