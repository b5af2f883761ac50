"""How long `import minikin` and `--help` take (bars: 0.4 s, 0.8 s on two cores), and a cold image's cost.

The image's cost is processor time of the whole process, alternating with one whose imports are not put off
(`minikin.lazy_imports`).
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
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
    return [*rows, cold_image()]


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
