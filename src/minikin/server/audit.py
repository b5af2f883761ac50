"""Nothing lost: every accepted job ended exactly once, every image and concept is what the ledger says it
is, and nothing else is there: no image, concept or temporary file that belongs to nobody.

    python -m minikin.server.audit FOLDER              of a server that is not running; prints what is wrong
    python -m minikin.server.audit FOLDER METRICS      and where /metrics, asked last and kept, says otherwise

Called after every test of the server, too. Reads the store and the folder alone.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from minikin.server.job_store import ENDS

STORE, RESULTS, INPUTS, CONCEPTS = "jobs.sqlite", "results", "inputs", "concepts"
TEMPORARY = ".minikin-"  # as `minikin.files` names them
PAINTED = ("paint", "refine", "inpaint")  # of n images
_NEEDED = "SELECT jobs.id AS job, value AS sha FROM jobs, json_each(jobs.concepts) WHERE ended IS NULL"


def problems(folder: Path, *, drained: bool = True) -> list[str]:
    """What is wrong, one sentence each; [] for nothing.

    drained  every job should have ended; False while a server may still be at work
    """
    db = sqlite3.connect(f"file:{folder / STORE}?mode=ro", uri=True)
    try:
        found = [*_jobs(db, drained), *_pictures(db, folder / RESULTS), *_shelf(db, folder / CONCEPTS)]
        return [*found, *(_left(db, folder) if drained else ())]
    finally:
        db.close()


def last(folder: Path) -> int:
    """The number of the ledger's last line."""
    with closing(sqlite3.connect(f"file:{folder / STORE}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT coalesce(max(n), 0) FROM ledger").fetchone()[0])


def disagreements(folder: Path, after: str, before: str = "", since: int | None = None) -> list[str]:
    """Where the counters of /metrics, between two looks at it, are not what the ledger says; [] for nowhere.

    before, after  the texts; "" for a process that had counted nothing
    since          the ledger's last line before; None for what its time says, that of the process's start
    """
    told, db = _counted(after), sqlite3.connect(f"file:{folder / STORE}?mode=ro", uri=True)
    told.subtract(_counted(before))
    with closing(db):
        if since is None:
            start = next(
                s.value for f in text_string_to_metric_families(after) for s in f.samples
                if s.name == "process_start_time_seconds"
            )  # fmt: skip
            since = db.execute("SELECT coalesce(max(n), 0) FROM ledger WHERE at<?", (start,)).fetchone()[0]
        ends = "FROM ledger l JOIN jobs j ON j.id=l.job WHERE l.n>? AND l.event IN (?, ?, ?)"
        kept = Counter[str]({
            f"{kind} {event}": n for kind, event, n in
            db.execute(f"SELECT j.kind, l.event, count(*) {ends} GROUP BY 1, 2", (since, *ENDS))
        })  # fmt: skip
        (kept["pictures"],) = db.execute(
            f"SELECT count(*) FROM pictures WHERE job IN (SELECT j.id {ends})", (since, *ENDS)
        ).fetchone()
    return [
        f"/metrics counts {told[what]:.0f} of '{what}', the ledger {kept[what]}"
        for what in sorted(told.keys() | kept.keys()) if told[what] != kept[what]
    ]  # fmt: skip


def _counted(text: str) -> Counter[str]:
    """Ends by kind and outcome, and images."""
    found = Counter[str]()
    for sample in (s for family in text_string_to_metric_families(text) for s in family.samples):
        if sample.name == "minikin_jobs_total":
            found[f"{sample.labels['kind']} {sample.labels['outcome']}"] = round(sample.value)
        elif sample.name == "minikin_pictures_total":
            found["pictures"] = round(sample.value)
    return found


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
    made = dict[str, list[int]]()
    for id_, job, number, sha, swept in db.execute("SELECT id, job, number, sha256, swept FROM pictures"):
        made.setdefault(job, []).append(number)
        path = folder / f"{id_}.png"
        if swept:
            continue
        known.add(path.name)
        if not path.is_file():
            found.append(f"image {id_} of job {job} has no file")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha:
            found.append(f"image {id_} of job {job} is not the one that was made")
    asked = "SELECT id, kind, json_extract(recipe, '$.n') FROM jobs WHERE status='completed'"
    for job, kind, n in db.execute(asked):
        numbers = sorted(made.get(job, []))
        if kind in PAINTED and len(numbers) != (n or 1):
            found.append(f"job {job} is completed with {len(numbers)} of {n or 1} images")
        if numbers != list(range(len(numbers))) or (kind == "masks" and not numbers):
            found.append(f"job {job} is completed with the {kind} of numbers {numbers}")
    for (job,) in db.execute("SELECT id FROM jobs WHERE status!='completed'"):
        if job in made:
            found.append(f"job {job} has {len(made[job])} images, and was not completed")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in known and not path.name.startswith(TEMPORARY):
            found.append(f"{path.name} belongs to no job")
    return found


def _shelf(db: sqlite3.Connection, folder: Path) -> list[str]:
    found = []
    for name, sha in db.execute("SELECT name, sha256 FROM shelf"):
        path = folder / f"{sha}.safetensors"
        if not path.is_file():
            found.append(f"concept {name} ({sha[:8]}) has no file")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha:
            found.append(f"concept {name} ({sha[:8]}) is not the one that was kept")
    for job, sha in db.execute(_NEEDED):
        if not (folder / f"{sha}.safetensors").is_file():
            found.append(f"a concept of job {job} ({sha[:8]}) has no file")
    return found


def _left(db: sqlite3.Connection, folder: Path) -> list[str]:
    """What a server that has ended leaves behind for nobody."""
    found = [f"{p.name} is a temporary file" for p in sorted(folder.rglob(f"{TEMPORARY}*"))]
    owned = {sha for (sha,) in db.execute(f"SELECT sha256 FROM shelf UNION SELECT sha FROM ({_NEEDED})")}
    for path in sorted((folder / CONCEPTS).iterdir()) if (folder / CONCEPTS).is_dir() else []:
        if path.name not in {f"{sha}.safetensors" for sha in owned} and not path.name.startswith(TEMPORARY):
            found.append(f"concept {path.name[:8]} belongs to nobody")
    wanted = {id_ for (id_,) in db.execute("SELECT id FROM jobs WHERE ended IS NULL")}
    there = (folder / INPUTS).iterdir() if (folder / INPUTS).is_dir() else ()
    return found + [f"images of job {p.name} are left, which has ended" for p in there if p.name not in wanted]


def main() -> None:
    wrong = problems(Path(sys.argv[1]))
    for path in sys.argv[2:]:
        wrong += disagreements(Path(sys.argv[1]), Path(path).read_text())
    print("\n".join(wrong) or "Every accepted job ended exactly once, and every image is there.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
