"""Audit of a server's folder: every accepted job ended exactly once, every image and concept has the content
that the job store recorded, and no image, concept or temporary file is left that belongs to nothing.

    python -m minikin.server.audit FOLDER              of a stopped server; prints problems, exit code 1 for any
    python -m minikin.server.audit FOLDER METRICS      also compares a saved response of /metrics with the store

It reads the store and the folder alone. Every test of the server ends with it.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from minikin.server.job_store import CONCEPTS as CONCEPTS_TABLE
from minikin.server.job_store import ENDS, EVENTS, IMAGES

STORE, RESULTS, INPUTS, CONCEPTS = "jobs.sqlite", "results", "inputs", "concepts"
TEMPORARY = ".minikin-"  # as `minikin.files` names them
IMAGE_JOBS = ("paint", "refine", "inpaint")  # with n images each
_NEEDED = "SELECT jobs.id AS job, value AS sha FROM jobs, json_each(jobs.concepts) WHERE ended IS NULL"


def problems(folder: Path, *, drained: bool = True) -> list[str]:
    """One sentence per problem; [] for none.

    drained  whether every job should have ended; False while the server may still be running
    """
    db = sqlite3.connect(f"file:{folder / STORE}?mode=ro", uri=True)
    try:
        sentences = [*_jobs(db, drained), *_images(db, folder / RESULTS), *_concepts(db, folder / CONCEPTS)]
        return [*sentences, *(_leftovers(db, folder) if drained else ())]
    finally:
        db.close()


def last_event(folder: Path) -> int:
    """The number of the last event in the store."""
    with closing(sqlite3.connect(f"file:{folder / STORE}?mode=ro", uri=True)) as db:
        return int(db.execute(f"SELECT coalesce(max(n), 0) FROM {EVENTS}").fetchone()[0])


def disagreements(folder: Path, after: str, before: str = "", since: int | None = None) -> list[str]:
    """Where the counters of /metrics differ from the store's events, one sentence each; [] for nowhere.

    before, after  two responses of /metrics; "" for a process that had counted nothing
    since          the last event before; None for the last one before the process started
    """
    counted, db = _counted(after), sqlite3.connect(f"file:{folder / STORE}?mode=ro", uri=True)
    counted.subtract(_counted(before))
    with closing(db):
        if since is None:
            start = next(
                s.value for f in text_string_to_metric_families(after) for s in f.samples
                if s.name == "process_start_time_seconds"
            )  # fmt: skip
            since = db.execute(f"SELECT coalesce(max(n), 0) FROM {EVENTS} WHERE at<?", (start,)).fetchone()[0]
        ends = f"FROM {EVENTS} l JOIN jobs j ON j.id=l.job WHERE l.n>? AND l.event IN (?, ?, ?)"
        recorded = Counter[str]({
            f"{kind} {event}": n for kind, event, n in
            db.execute(f"SELECT j.kind, l.event, count(*) {ends} GROUP BY 1, 2", (since, *ENDS))
        })  # fmt: skip
        (recorded["images"],) = db.execute(
            f"SELECT count(*) FROM {IMAGES} WHERE job IN (SELECT j.id {ends})", (since, *ENDS)
        ).fetchone()
    return [
        f"/metrics counts {counted[name]:.0f} of '{name}', the store's events {recorded[name]}"
        for name in sorted(counted.keys() | recorded.keys()) if counted[name] != recorded[name]
    ]  # fmt: skip


def _counted(text: str) -> Counter[str]:
    """Counters of ended jobs by kind and outcome, and of images."""
    counts = Counter[str]()
    for sample in (s for family in text_string_to_metric_families(text) for s in family.samples):
        if sample.name == "minikin_jobs_total":
            counts[f"{sample.labels['kind']} {sample.labels['outcome']}"] = round(sample.value)
        elif sample.name == "minikin_pictures_total":  # word: name of the metric
            counts["images"] = round(sample.value)
    return counts


def _jobs(db: sqlite3.Connection, drained: bool) -> list[str]:
    sentences = []
    events_of: dict[str, list[str]] = {}
    for job, event in db.execute(f"SELECT job, event FROM {EVENTS} ORDER BY n"):
        events_of.setdefault(job, []).append(event)
    status = dict(db.execute("SELECT id, status FROM jobs"))
    for job in status.keys() - events_of.keys():
        sentences.append(f"job {job} is in the store without an event")
    for job, events in events_of.items():
        ends = [e for e in events if e in ENDS]
        if events.count("accepted") != 1 or events[0] != "accepted":
            sentences.append(f"job {job} was accepted {events.count('accepted')} times")
        if len(ends) > 1:
            sentences.append(f"job {job} ended {len(ends)} times: {', '.join(ends)}")
        if ends and events[-1] != ends[-1]:
            sentences.append(f"job {job} went on after its end")
        if not ends and drained:
            sentences.append(f"job {job} never ended: {', '.join(events)}")
        if ends and status.get(job) != ends[-1]:
            sentences.append(f"job {job} is {status.get(job)} in the store and {ends[-1]} by its events")
    return sentences


def _images(db: sqlite3.Connection, folder: Path) -> list[str]:
    sentences, stored_names = [], set()
    numbers_of = dict[str, list[int]]()
    for id_, job, number, sha, swept in db.execute(f"SELECT id, job, number, sha256, swept FROM {IMAGES}"):
        numbers_of.setdefault(job, []).append(number)
        path = folder / f"{id_}.png"
        if swept:
            continue
        stored_names.add(path.name)
        if path.is_symlink():  # to a file of the person who uses this server: theirs to change
            continue
        if not path.is_file():
            sentences.append(f"image {id_} of job {job} has no file")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha:
            sentences.append(f"image {id_} of job {job} does not have the recorded content")
    completed = "SELECT id, kind, json_extract(recipe, '$.n') FROM jobs WHERE status='completed'"
    for job, kind, n in db.execute(completed):
        numbers = sorted(numbers_of.get(job, []))
        if kind in IMAGE_JOBS and len(numbers) != (n or 1):
            sentences.append(f"job {job} is completed with {len(numbers)} of {n or 1} images")
        if numbers != list(range(len(numbers))) or (kind == "masks" and not numbers):
            sentences.append(f"job {job} is completed with the {kind} of numbers {numbers}")
    for (job,) in db.execute("SELECT id FROM jobs WHERE status!='completed'"):
        if job in numbers_of:
            sentences.append(f"job {job} has {len(numbers_of[job])} images, and was not completed")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in stored_names and not path.name.startswith(TEMPORARY):
            sentences.append(f"{path.name} belongs to no job")
    return sentences


def _concepts(db: sqlite3.Connection, folder: Path) -> list[str]:
    sentences = []
    for name, sha in db.execute(f"SELECT name, sha256 FROM {CONCEPTS_TABLE}"):
        path = folder / f"{sha}.safetensors"
        if not path.is_file():
            sentences.append(f"concept {name} ({sha[:8]}) has no file")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha:
            sentences.append(f"concept {name} ({sha[:8]}) does not have the recorded content")
    for job, sha in db.execute(_NEEDED):
        if not (folder / f"{sha}.safetensors").is_file():
            sentences.append(f"a concept of job {job} ({sha[:8]}) has no file")
    return sentences


def _leftovers(db: sqlite3.Connection, folder: Path) -> list[str]:
    """Files of a stopped server that belong to no job and no client."""
    sentences = [f"{p.name} is a temporary file" for p in sorted(folder.rglob(f"{TEMPORARY}*"))]
    owned = {
        sha for (sha,) in db.execute(f"SELECT sha256 FROM {CONCEPTS_TABLE} UNION SELECT sha FROM ({_NEEDED})")
    }
    for path in sorted((folder / CONCEPTS).iterdir()) if (folder / CONCEPTS).is_dir() else []:
        if path.name not in {f"{sha}.safetensors" for sha in owned} and not path.name.startswith(TEMPORARY):
            sentences.append(f"concept {path.name[:8]} belongs to nobody")
    unfinished = {id_ for (id_,) in db.execute("SELECT id FROM jobs WHERE ended IS NULL")}
    folders = (folder / INPUTS).iterdir() if (folder / INPUTS).is_dir() else ()
    return sentences + [
        f"images of job {p.name} are left, which has ended" for p in folders if p.name not in unfinished
    ]


def main() -> None:
    wrong = problems(Path(sys.argv[1]))
    for path in sys.argv[2:]:
        wrong += disagreements(Path(sys.argv[1]), Path(path).read_text())
    print("\n".join(wrong) or "Every accepted job ended exactly once, and every image is there.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
