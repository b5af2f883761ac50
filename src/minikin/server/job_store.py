"""The job store: one SQLite file in WAL mode, every change but `start` durable when the call returns.

    jobs      one row a job: what was asked for and how it stands
    images  one row a finished image: its opaque id, its seed, the SHA-256 of its file
    ledger    what happened, appended only: accepted, started, completed, failed, cancelled
    shelf     whose concept has which name and which content

What is forgotten is overwritten in the file, and not only marked as free.

A store that cannot be read, or of a later version, is refused with its path and never touched.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from minikin.errors import StorageError

VERSION = 1
ENDS = ("completed", "failed", "cancelled")
_TABLES = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, client TEXT NOT NULL, dialect TEXT NOT NULL, task TEXT NOT NULL,
    held INTEGER NOT NULL, status TEXT NOT NULL, recipe TEXT NOT NULL, concepts TEXT NOT NULL,
    warnings TEXT NOT NULL, created REAL NOT NULL, started REAL, ended REAL,
    attempts INTEGER NOT NULL DEFAULT 0, code TEXT, message TEXT, result TEXT);
CREATE INDEX jobs_by_client ON jobs (client, created);
CREATE TABLE pictures (
    id TEXT PRIMARY KEY, job TEXT NOT NULL, number INTEGER NOT NULL, seed INTEGER, sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, made REAL NOT NULL,
    swept INTEGER NOT NULL DEFAULT 0, UNIQUE (job, number));
CREATE TABLE ledger (n INTEGER PRIMARY KEY, job TEXT NOT NULL, event TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX ledger_by_job ON ledger (job);
CREATE TABLE shelf (
    client TEXT NOT NULL, sha256 TEXT NOT NULL, name TEXT NOT NULL, added REAL NOT NULL,
    PRIMARY KEY (client, sha256));
"""


class Stored(NamedTuple):
    """A finished image: `id` names its file."""

    id: str
    number: int
    seed: int | None
    sha256: str
    bytes: int
    width: int
    height: int


class Store:
    """One connection, used in turns; `path` None keeps everything in memory.

    wait_s  how long another process may hold the file before that is an error
    """

    def __init__(self, path: Path | None, wait_s: float = 10.0) -> None:
        self._lock = threading.Lock()
        self.path = path
        try:
            self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            for setting in (f"busy_timeout={round(1000 * wait_s)}", "journal_mode=WAL", "secure_delete=ON"):
                self._db.execute(f"PRAGMA {setting}")
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            if not found:
                self._db.executescript(f"BEGIN;{_TABLES}PRAGMA user_version={VERSION};COMMIT;")
            problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.Error as e:
            raise StorageError(
                f"The job store {path} cannot be used ({e}). Move it away to start with an empty one; it "
                "was not changed."
            ) from e
        if found > VERSION:
            raise StorageError(
                f"The job store {path} is of version {found}; this Minikin reads up to {VERSION}. Update it."
            )
        if problem != "ok":
            raise StorageError(
                f"The job store {path} is damaged ({problem}). Move it away to start with an empty one."
            )

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self, sync: str = "FULL") -> Iterator[sqlite3.Connection]:
        """sync: FULL survives a power cut; NORMAL an end of this process alone, and waits for no disk."""
        with self._lock:
            try:
                self._db.execute(f"PRAGMA synchronous={sync}")
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as e:
                full = getattr(e, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
                why = f"The job store {self.path} was not written: {e}."
                raise StorageError(why, "storage_full" if full else "storage") from e

    def _rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        with self._lock:
            try:
                return [dict(row) for row in self._db.execute(sql, values).fetchall()]
            except sqlite3.Error as e:
                raise StorageError(f"The job store {self.path} cannot be read: {e}.") from e

    # ---- jobs --------------------------------------------------------------------------------

    def accept(self, job: dict[str, Any]) -> None:
        """A new job: from here on it ends exactly once."""
        told = {**job, "warnings": json.dumps(job["warnings"]), "concepts": json.dumps(job["concepts"])}
        with self._change() as db:
            db.execute(
                f"INSERT INTO jobs ({', '.join(told)}) VALUES ({', '.join('?' * len(told))})",
                tuple(told.values()),
            )
            _note(db, [job["id"]], "accepted")

    def start(self, ids: Sequence[str]) -> None:
        """These are begun, but for those that were cancelled a moment before: their end stands.

        A power cut may take this back, and then costs one attempt that is not counted.
        """
        with self._change("NORMAL") as db:
            begun = [
                id_ for id_ in ids
                if db.execute(
                    "UPDATE jobs SET status='running', started=?, attempts=attempts+1 "
                    "WHERE id=? AND ended IS NULL",
                    (time.time(), id_),
                ).rowcount
            ]  # fmt: skip
            _note(db, begun, "started")

    def end(
        self, id_: str, status: str, *, pictures: Sequence[Stored] = (), code: str | None = None,
        message: str | None = None, result: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """The one end of a job, with its images."""
        assert status in ENDS, status
        now = time.time()
        with self._change() as db:
            db.execute(
                "UPDATE jobs SET status=?, ended=?, code=?, message=?, result=? WHERE id=?",
                (status, now, code, message, json.dumps(result) if result else None, id_),
            )
            db.executemany(
                "INSERT INTO pictures (id, number, seed, sha256, bytes, width, height, job, made) "
                "VALUES (?,?,?,?,?,?,?,?,?)",
                [(*p, id_, now) for p in pictures],
            )
            _note(db, [id_], status)

    def reopen(self, id_: str, code: str | None, message: str | None) -> None:
        """It failed for now and is tried again by the next start; what was begun until now does not count."""
        with self._change() as db:
            db.execute(
                "UPDATE jobs SET status='queued', attempts=0, code=?, message=? WHERE id=? AND ended IS NULL",
                (code, message, id_),
            )

    def job(self, id_: str) -> dict[str, Any] | None:
        found = self._rows("SELECT * FROM jobs WHERE id=?", id_)
        return _read(found[0]) if found else None

    def jobs(self, client: str, limit: int) -> list[dict[str, Any]]:
        """A client's jobs, the newest first."""
        found = self._rows("SELECT * FROM jobs WHERE client=? ORDER BY created DESC LIMIT ?", client, limit)
        return [_read(row) for row in found]

    def unfinished(self) -> list[dict[str, Any]]:
        """Jobs that have not ended, in the order they came in."""
        return [_read(r) for r in self._rows("SELECT * FROM jobs WHERE ended IS NULL ORDER BY created")]

    # ---- results -----------------------------------------------------------------------------

    def pictures(self, job: str) -> list[dict[str, Any]]:
        return self._rows("SELECT * FROM pictures WHERE job=? ORDER BY number", job)

    def picture(self, id_: str, client: str) -> dict[str, Any] | None:
        """An image by its id, if it is this client's and still there."""
        found = self._rows(
            "SELECT p.*, j.client FROM pictures p JOIN jobs j ON j.id=p.job "
            "WHERE p.id=? AND j.client=? AND p.swept=0", id_, client,
        )  # fmt: skip
        return found[0] if found else None

    def oldest_pictures(self) -> list[dict[str, Any]]:
        return self._rows("SELECT id, bytes, made FROM pictures WHERE swept=0 ORDER BY made")

    def forget(self, ids: Sequence[str]) -> None:
        """These images' files are gone."""
        with self._change() as db:
            db.executemany("UPDATE pictures SET swept=1 WHERE id=?", [(i,) for i in ids])

    def expire(self, before: float) -> int:
        """Forget jobs that ended before this time and have no image left: what was asked for, and all that
        the ledger says of them; how many."""
        with self._change() as db:
            found = db.execute(
                "SELECT id FROM jobs WHERE ended < ? AND NOT EXISTS "
                "(SELECT 1 FROM pictures WHERE job=jobs.id AND swept=0)", (before,),
            ).fetchall()  # fmt: skip
            for table, key in (("jobs", "id"), ("pictures", "job"), ("ledger", "job")):
                db.executemany(f"DELETE FROM {table} WHERE {key}=?", [(row["id"],) for row in found])
        if found:
            self._rows("PRAGMA wal_checkpoint(TRUNCATE)")  # the log still has them
        return len(found)

    # ---- the shelf ---------------------------------------------------------------------------

    def shelve(self, client: str, sha256: str, name: str) -> None:
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO shelf VALUES (?,?,?,?)", (client, sha256, name, time.time()))

    def shelved(self, client: str) -> list[dict[str, Any]]:
        """A client's concepts, the newest of a name last."""
        return self._rows("SELECT * FROM shelf WHERE client=? ORDER BY added, rowid", client)

    def unshelve(self, client: str, sha256: str) -> None:
        with self._change() as db:
            db.execute("DELETE FROM shelf WHERE client=? AND sha256=?", (client, sha256))

    def contents(self) -> set[str]:
        """What somebody has on a shelf, or a job needs that has not ended."""
        found = {row["sha256"] for row in self._rows("SELECT DISTINCT sha256 FROM shelf")}
        named = self._rows("SELECT concepts FROM jobs WHERE ended IS NULL AND concepts!='{}'")
        return found.union(*(json.loads(row["concepts"]).values() for row in named))


def _note(db: sqlite3.Connection, ids: Sequence[str], event: str) -> None:
    db.executemany("INSERT INTO ledger (job, event, at) VALUES (?,?,?)", [(i, event, time.time()) for i in ids])


def _read(row: dict[str, Any]) -> dict[str, Any]:
    try:
        told = {k: json.loads(row[k]) for k in ("warnings", "concepts", "recipe")}
        return {**row, **told, "result": json.loads(row["result"]) if row["result"] else None}
    except ValueError as e:
        raise StorageError(
            f"Job {row['id']} of the job store is damaged ({e}). Move the store away to start anew."
        ) from e
