"""Nothing lost: every accepted job ended exactly once, and every picture is what the ledger says it is.

    python -m minikin.server.ledger FOLDER      of a server that is not running; prints what is wrong

Called after every test of the server, too. Reads the store and the results folder alone.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from pathlib import Path

from minikin.server.store import ENDS

STORE, RESULTS = "jobs.sqlite", "results"


def problems(folder: Path, *, drained: bool = True) -> list[str]:
    """What is wrong, one sentence each; [] for nothing.

    drained  every job should have ended; False while a server may still be at work
    """
    db = sqlite3.connect(f"file:{folder / STORE}?mode=ro", uri=True)
    try:
        return [*_jobs(db, drained), *_pictures(db, folder / RESULTS)]
    finally:
        db.close()


def _jobs(db: sqlite3.Connection, drained: bool) -> list[str]:
    found = []
    told: dict[str, list[str]] = {}
    for job, event in db.execute("SELECT job, event FROM ledger ORDER BY n"):
        told.setdefault(job, []).append(event)
    status = dict(db.execute("SELECT id, status FROM jobs"))
    for job in status.keys() - told.keys():
        found.append(f"job {job} is in the store but not in the ledger")
    for job, events in told.items():
        ends = [e for e in events if e in ENDS]
        if events.count("accepted") != 1 or events[0] != "accepted":
            found.append(f"job {job} was accepted {events.count('accepted')} times")
        if len(ends) > 1:
            found.append(f"job {job} ended {len(ends)} times: {', '.join(ends)}")
        if ends and events[-1] != ends[-1]:
            found.append(f"job {job} went on after its end")
        if not ends and drained:
            found.append(f"job {job} never ended: {', '.join(events)}")
        if ends and status.get(job) != ends[-1]:
            found.append(f"job {job} is {status.get(job)} in the store and {ends[-1]} in the ledger")
    return found


def _pictures(db: sqlite3.Connection, folder: Path) -> list[str]:
    found, known = [], set()
    asked = dict(db.execute(
        "SELECT id, json_extract(recipe, '$.n') FROM jobs WHERE status='completed' AND kind='paint'"
    ))  # fmt: skip
    made: dict[str, int] = {}
    for id_, job, sha, swept in db.execute("SELECT id, job, sha256, swept FROM pictures"):
        made[job] = made.get(job, 0) + 1
        known.add(f"{id_}.png")
        path = folder / f"{id_}.png"
        if swept:
            continue
        if not path.is_file():
            found.append(f"picture {id_} of job {job} has no file")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha:
            found.append(f"picture {id_} of job {job} is not the one that was made")
    for job, n in asked.items():
        if made.get(job, 0) != (n or 1):
            found.append(f"job {job} is completed with {made.get(job, 0)} of {n or 1} pictures")
    for path in folder.glob("*.png") if folder.is_dir() else []:
        if path.name not in known:
            found.append(f"{path.name} belongs to no job")
    return found


def main() -> None:
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "Every accepted job ended exactly once, and every picture is there.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
