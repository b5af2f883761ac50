"""How long `import minikin` and `minikin --help` take (bars: 0.4 s and 0.8 s on two cores)."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import command

CLI = "import sys; from minikin.cli.app import app;"


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
    return rows
