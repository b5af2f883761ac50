"""kill -9 at random moments: one harness for everything that works for long and says it goes on.

    wrong = Kills(WORKS["teach"], folder, seed=0).run(20)

Work runs in a process of its own that is killed at a moment drawn from the seed, again and again, each time
going on with what the last one left. After every kill: no file is torn, and what is saved is at most one
interval behind what was done. At the end: the result is that of a run that nobody killed.

Children are forked from one server that has imported everything once (multiprocessing's forkserver).
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
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from minikin import files

Begin = Callable[[Path, Any], None]


@dataclass(frozen=True)
class Work:
    """Something that can be killed.

    begin     does the work in a folder, or goes on with it; told a counter, where it notes the steps done
    saved     how many steps a folder holds safely
    result    what the work was for, as text or a digest; compared with an unbroken run's
    interval  steps between two saves
    """

    begin: Begin
    saved: Callable[[Path], int]
    result: Callable[[Path], str]
    interval: int = 1
    preload: tuple[str, ...] = ()


@dataclass
class Kills:
    """The killing of one work; `run` says what went wrong."""

    work: Work
    folder: Path
    seed: int = 0
    killed: int = 0
    early: int = 0  # children that were done before their moment came
    worst: int = 0  # steps that a kill cost at most
    wrong: list[str] = field(default_factory=list)

    def run(self, kills: int) -> list[str]:
        """Kill so often; what went wrong, [] for nothing."""
        rng = random.Random(self.seed)
        whole = self.folder / "whole"
        whole.mkdir(parents=True)
        code, _, took = _life(self.work, whole, None)
        if code != 0:
            return [f"the unbroken run ended with {code}"]
        wanted, turn = self.work.result(whole), 0
        while self.killed < kills and not self.wrong:
            part = self.folder / f"part{turn}"
            part.mkdir()
            turn += 1
            for _ in range(rng.randint(1, 4)):
                if self.killed < kills and not self._killed(part, rng.uniform(0, 0.7 * took)):
                    break
            code, *_ = _life(self.work, part, None)
            if code != 0:
                self.wrong.append(f"what went on after {self.killed} kills ended with {code}")
            elif self.work.result(part) != wanted:
                self.wrong.append(f"after {self.killed} kills the result is another one")
            self._swept(part)
        return self.wrong

    def _killed(self, part: Path, after: float) -> bool:
        """Begin, kill, look; False when the work was done before."""
        code, done, _ = _life(self.work, part, after)
        if code == 0:
            self.early += 1
            return False
        if code != -signal.SIGKILL:
            self.wrong.append(f"a life ended by itself with {code}")
            return False
        self.killed += 1
        self.wrong += torn(part)
        lost = done - self.work.saved(part)
        self.worst = max(self.worst, lost)
        if lost > self.work.interval:
            self.wrong.append(f"{lost} steps were lost; at most {self.work.interval} may be")
        return not self.wrong

    def _swept(self, part: Path) -> None:
        """Temporary files of the killed are recognised as such by whoever comes next (here: of any age)."""
        for folder in [part, *(p for p in part.rglob("*") if p.is_dir())]:
            if folder.is_dir():
                files.sweep_orphans(folder, min_age_s=0)
        self.wrong += [f"{p.name} was left behind" for p in part.rglob(".minikin-*")]


_contexts: dict[tuple[str, ...], Any] = {}


def _life(work: Work, folder: Path, after: float | None) -> tuple[int, int, float]:
    """Exit code, steps done and seconds of work of one process; killed `after` seconds of work, or never.

    Work begins when it says so: starting the first process, and the server it is forked from, takes longer."""
    here = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(
        [here, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ))  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    if not _contexts:
        context.set_forkserver_preload(["tests.helpers.killed"])
        _contexts[()] = context
    done = context.Value("q", -1, lock=False)
    child = context.Process(target=work.begin, args=(folder, done))
    child.start()
    while done.value < 0 and child.is_alive():
        time.sleep(0.002)
    begun = time.monotonic()
    if after is not None:
        child.join(after)
        child.kill()
    child.join()
    took = time.monotonic() - begun
    code, steps = child.exitcode, done.value
    child.close()
    assert code is not None
    return code, max(0, steps), took


def torn(folder: Path) -> list[str]:
    """Files that are neither whole nor absent; temporary ones and a log's last line do not count."""
    found = []
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
            found.append(f"{path.name} is torn: {e}")
    return found


def digest(path: Path) -> str:
    """Of a safetensors file's tensors; its metadata may tell how long it took."""
    told = hashlib.sha256()
    for name, values in sorted(load_file(path).items()):
        told.update(name.encode() + str(values.shape).encode() + values.tobytes())
    return told.hexdigest()
