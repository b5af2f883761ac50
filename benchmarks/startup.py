"""How long `import minikin` and `--help` take (bars: 0.4 s, 0.8 s on two cores), and an image from the shell.

A cold image's cost is processor time of the whole process, alternating with one whose imports are not put off
(`minikin.lazy_imports`). A warm one's is the time from shell to file beside a resident process (bar 0.6 s).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.measure import command, spread

CLI = "import sys; from minikin.cli.app import app;"
PAINT = (
    "import sys; from minikin.cli.app import main;"
    "sys.argv = ['minikin', 'paint', 'a cat', '--steps', '1', '--out', {!r}];"
)
AT_ONCE = " from minikin import lazy_imports; lazy_imports.install = lambda: None;"
RUNS = 5


def run() -> list[dict[str, Any]]:
    rows = []
    for what, bar, args in (
        ("import minikin", 400, ("-c", "import minikin")),
        ("minikin --help", 800, ("-c", f"{CLI} sys.argv = ['m', '--help']; app()")),
        ("minikin teach --help", 800, ("-c", f"{CLI} sys.argv = ['m', 'teach', '--help']; app()")),
    ):  # fmt: skip
        t = command(*args)
        value = f"{t['median_ms']:.0f} ms"
        rows.append({"what": what, "value": value, "bar": f"<= {bar} ms", "holds": t["median_ms"] <= bar, **t})
    return [*rows, cold_image(), *warm_image()]


def cold_image() -> dict[str, Any]:
    """Processor time of `minikin paint` with imports put off, and as a ratio to all imports at once."""
    with tempfile.TemporaryDirectory() as folder:
        paint = PAINT.format(folder)
        pairs = [
            (_processor_s(f"{paint} main()"), _processor_s(f"{paint}{AT_ONCE} main()")) for _ in range(RUNS)
        ]
    later, ratio = spread([a for a, _ in pairs]), spread([a / b for a, b in pairs])
    value = f"{later} s, {ratio} of all imports at once"
    return {"what": "minikin paint, cold, processor time", "value": value, "bar": "", "pairs": pairs}


def _processor_s(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def warm_image(runs: int = 15) -> list[dict[str, Any]]:
    """Seconds of `minikin paint` in one step: cold, then in forks of a resident process."""
    from minikin.cli.resident import client

    line = [sys.executable, "-m", "minikin", "paint", "a cat", "--preset", "lcm-lora", "--steps", "1"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_RUNTIME_DIR": folder, client.VARIABLE: "10"}

        def seconds(*options: str) -> float:
            start = time.perf_counter()
            subprocess.run([*line, *options], env=environment, cwd=folder, check=True, capture_output=True)
            return time.perf_counter() - start

        try:
            cold = [seconds("--no-resident") for _ in range(3)]
            seconds()  # starts it
            seconds()  # waits for it
            warm = sorted(seconds() for _ in range(runs))
        finally:
            subprocess.run([sys.executable, "-m", "minikin", "stop"], env=environment, capture_output=True)
    p50, p95 = warm[len(warm) // 2], warm[int(len(warm) * 0.95)]
    return [
        {"what": "minikin paint, 1 step, cold", "value": f"{sorted(cold)[1]:.2f} s (median of 3)"},
        {"what": "the same beside a resident process", "value": f"{p50:.2f} ({p95:.2f}) s, p50 (p95) of {runs}",
         "bar": "<= 0.6 s", "holds": p50 <= 0.6},
    ]  # fmt: skip
