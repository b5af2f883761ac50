"""Run the benchmarks and print a table and JSON.

python -m benchmarks                 all but the slow ones
python -m benchmarks startup packing  some
python -m benchmarks --json out.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks import (
    adapters,
    corpus,
    library,
    measure,
    memory,
    packing,
    page,
    painting,
    server,
    speed,
    startup,
    teaching,
    workflow,
)  # fmt: skip

ALL = {
    "startup": startup.run, "packing": packing.run, "painting": painting.run, "teaching": teaching.run,
    "memory": memory.run, "corpus": corpus.run, "adapters": adapters.run,
    "speed": speed.run, "workflow": workflow.run, "server": server.run,
    "library": library.run, "page": page.run,
}  # fmt: skip
SLOW = ("memory", "corpus", "library")


def main() -> None:
    args = sys.argv[1:]
    out = args[args.index("--json") + 1] if "--json" in args else None
    names = [a for a in args if a in ALL] or [n for n in ALL if n not in SLOW]
    results: dict[str, Any] = {"machine": measure.machine()}
    print(json.dumps(results["machine"]))
    for name in names:
        results[name] = ALL[name]()
        for row in results[name]:
            held = {True: "holds", False: "MISSED", None: ""}[row.get("holds")]
            print(f"{name:10} {row['what']:62} {row['value']:>12} {row.get('bar', ''):>12} {held}", flush=True)
    if out:
        with open(out, "w") as f:
            json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
