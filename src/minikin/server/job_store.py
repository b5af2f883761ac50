"""Job store: one SQLite file in WAL mode, every change but `start` durable when the call returns.

    jobs      one row per job: its request and its status
    IMAGES    one row per finished image: its opaque id, its seed, the SHA-256 of its file
    EVENTS    append-only log: accepted, started, completed, failed, cancelled
    CONCEPTS  which client owns which concept, by name and content
    favourites  ids of the images that their owners marked; earlier versions do not know this table

Deleted rows are overwritten in the file, not only marked as free.

A store that cannot be read, or that a later version wrote, is rejected with its path and never changed.
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

# the second where a message of SQLite quotes a damaged file
PROBLEMS = (sqlite3.Error, UnicodeDecodeError)
VERSION = 1
IMAGES, EVENTS, CONCEPTS = "pictures", "ledger", "shelf"  # word: names of the tables since version 0.1
ENDS = ("completed", "failed", "cancelled")
_TABLES = f"""
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, client TEXT NOT NULL, dialect TEXT NOT NULL, task TEXT NOT NULL,
    held INTEGER NOT NULL, status TEXT NOT NULL, recipe TEXT NOT NULL, concepts TEXT NOT NULL,
    warnings TEXT NOT NULL, created REAL NOT NULL, started REAL, ended REAL,
    attempts INTEGER NOT NULL DEFAULT 0, code TEXT, message TEXT, result TEXT);
CREATE INDEX jobs_by_client ON jobs (client, created);
CREATE TABLE {IMAGES} (
    id TEXT PRIMARY KEY, job TEXT NOT NULL, number INTEGER NOT NULL, seed INTEGER, sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, made REAL NOT NULL,
    swept INTEGER NOT NULL DEFAULT 0, UNIQUE (job, number));
CREATE TABLE {EVENTS} (n INTEGER PRIMARY KEY, job TEXT NOT NULL, event TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX {EVENTS}_by_job ON {EVENTS} (job);
CREATE TABLE {CONCEPTS} (
    client TEXT NOT NULL, sha256 TEXT NOT NULL, name TEXT NOT NULL, added REAL NOT NULL,
    PRIMARY KEY (client, sha256));
"""


# tables that earlier versions did not have
_LATER = (
    "CREATE TABLE IF NOT EXISTS favourites (image TEXT PRIMARY KEY)",
    "CREATE TABLE IF NOT EXISTS parents (job TEXT PRIMARY KEY, image TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS parents_by_image ON parents (image)",
)
MAX_FAMILY = 200  # images that are listed


class StoredImage(NamedTuple):
    """A finished image; `id` is the name of its file."""

    id: str
    number: int
    seed: int | None
    sha256: str
    bytes: int
    width: int
    height: int


class JobStore:
    """The store behind one connection and one lock; `path` None keeps everything in memory.

    wait_s  how long another process may hold the file before that is an error
    """

    def __init__(self, path: Path | None, wait_s: float = 10.0) -> None:
        self._lock = threading.Lock()
        self.path = path
        try:
            self._db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.create_function("folded", 1, _folded, deterministic=True)
            for setting in (f"busy_timeout={round(1000 * wait_s)}", "journal_mode=WAL", "secure_delete=ON"):
                self._db.execute(f"PRAGMA {setting}")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if not version:
                self._db.executescript(f"BEGIN;{_TABLES}PRAGMA user_version={VERSION};COMMIT;")
            if version <= VERSION:
                for sql in _LATER:
                    self._db.execute(sql)
            problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        except PROBLEMS as e:
            raise StorageError(
                f"The job store {path} cannot be used ({e}). Move it away to start with an empty one; it "
                "was not changed."
            ) from e
        if version > VERSION:
            raise StorageError(
                f"The job store {path} has version {version}; this Minikin reads up to {VERSION}. Update it."
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
        """A transaction. sync: FULL survives a power cut; NORMAL does not wait for the disk."""
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
            except PROBLEMS as e:
                full = getattr(e, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
                why = f"The job store {self.path} was not written: {e}."
                raise StorageError(why, "storage_full" if full else "storage") from e

    def _rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        with self._lock:
            try:
                return [dict(row) for row in self._db.execute(sql, values).fetchall()]
            except PROBLEMS as e:
                raise StorageError(f"The job store {self.path} cannot be read: {e}.") from e

    # ---- jobs --------------------------------------------------------------------------------

    def accept(self, job: dict[str, Any], parent: str = "") -> None:
        """Add a job; from here on it ends exactly once. parent: the id of the image it starts from."""
        columns = {**job, "warnings": json.dumps(job["warnings"]), "concepts": json.dumps(job["concepts"])}
        with self._change() as db:
            db.execute(
                f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
                tuple(columns.values()),
            )
            if parent:
                db.execute("INSERT INTO parents VALUES (?, ?)", (job["id"], parent))
            _log(db, [job["id"]], "accepted")

    def start(self, ids: Sequence[str]) -> None:
        """Mark jobs as running, except for those that were cancelled a moment before.

        A power cut may undo this, which costs one attempt that is not counted.
        """
        with self._change("NORMAL") as db:
            started = [
                id_ for id_ in ids
                if db.execute(
                    "UPDATE jobs SET status='running', started=?, attempts=attempts+1 "
                    "WHERE id=? AND ended IS NULL",
                    (time.time(), id_),
                ).rowcount
            ]  # fmt: skip
            _log(db, started, "started")

    def end(
        self, id_: str, status: str, *, images: Sequence[StoredImage] = (), code: str | None = None,
        message: str | None = None, result: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Record the end of a job, with its images."""
        assert status in ENDS, status
        now = time.time()
        with self._change() as db:
            db.execute(
                "UPDATE jobs SET status=?, ended=?, code=?, message=?, result=? WHERE id=?",
                (status, now, code, message, json.dumps(result) if result else None, id_),
            )
            db.executemany(
                f"INSERT INTO {IMAGES} (id, number, seed, sha256, bytes, width, height, job, made) "
                "VALUES (?,?,?,?,?,?,?,?,?)",
                [(*p, id_, now) for p in images],
            )
            _log(db, [id_], status)

    def reopen(self, id_: str, code: str | None, message: str | None) -> None:
        """Requeue a job that failed for now: the next start runs it again."""
        with self._change() as db:
            db.execute(
                "UPDATE jobs SET status='queued', code=?, message=? WHERE id=? AND ended IS NULL",
                (code, message, id_),
            )

    def job(self, id_: str) -> dict[str, Any] | None:
        rows = self._rows("SELECT * FROM jobs WHERE id=?", id_)
        return _read(rows[0]) if rows else None

    def jobs(self, client: str, limit: int, before: float | None = None) -> list[dict[str, Any]]:
        """A client's jobs, newest first; those created before a time, by default all."""
        rows = self._rows(
            "SELECT * FROM jobs WHERE client=? AND (? IS NULL OR created<?) ORDER BY created DESC LIMIT ?",
            client, before, before, limit,
        )  # fmt: skip
        return [_read(row) for row in rows]

    def unfinished(self) -> list[dict[str, Any]]:
        """Jobs that have not ended, oldest first."""
        return [_read(r) for r in self._rows("SELECT * FROM jobs WHERE ended IS NULL ORDER BY created")]

    # ---- results -----------------------------------------------------------------------------

    def images(self, job: str) -> list[dict[str, Any]]:
        return self._rows(f"SELECT * FROM {IMAGES} WHERE job=? ORDER BY number", job)

    def image(self, id_: str, client: str) -> dict[str, Any] | None:
        """An image by its id, if it belongs to this client and its file is still there."""
        rows = self._rows(
            f"SELECT p.*, j.client FROM {IMAGES} p JOIN jobs j ON j.id=p.job "
            "WHERE p.id=? AND j.client=? AND p.swept=0", id_, client,
        )  # fmt: skip
        return rows[0] if rows else None

    def gallery(
        self, client: str, search: str, favourite: bool, limit: int, offset: int
    ) -> tuple[int, list[dict[str, Any]]]:
        """How many images of a client are there, and some of them, newest first, with kind, recipe and result.

        search     a part of the prompt, in capitals or small letters; "" for all
        favourite  favourites alone
        """
        images = (
            f"FROM {IMAGES} p JOIN jobs j ON j.id=p.job LEFT JOIN favourites f ON f.image=p.id "
            "WHERE j.client=? AND p.swept=0 AND j.kind IN ('paint', 'refine', 'inpaint') "
            "AND (?='' OR (json_valid(j.recipe) AND "
            "instr(folded(json_extract(j.recipe, '$.prompt')), folded(?)))) "
            "AND (NOT ? OR f.image IS NOT NULL)"
        )
        values = (client, search, search, favourite)
        total = int(self._rows(f"SELECT count(*) AS n {images}", *values)[0]["n"])
        rows = self._rows(
            f"SELECT p.*, j.kind, j.recipe, j.result, f.image IS NOT NULL AS favourite {images} "
            "ORDER BY p.made DESC, p.job, p.number LIMIT ? OFFSET ?", *values, limit, offset,
        )  # fmt: skip
        return total, _with_json(rows)

    def family(self, client: str, id_: str) -> tuple[list[dict[str, Any]], bool]:
        """An image, those it was made from and all made from these, oldest first, as `gallery` has them; and
        whether there are more than MAX_FAMILY: then it, its ancestors and the nearest to the first are listed.

        Each has its `parent`, the id of the image it was made from; "" for none. Deleted ones are left out.
        """
        ancestors = self._rows(
            "WITH RECURSIVE line (id) AS (VALUES (?) UNION SELECT r.image FROM line "
            f"JOIN {IMAGES} p ON p.id=line.id JOIN parents r ON r.job=p.job) SELECT id FROM line", id_,
        )  # fmt: skip
        line = [row["id"] for row in ancestors]  # from the image itself to the first
        tree = self._rows(
            "WITH RECURSIVE tree (id, parent) AS (VALUES (?, '') UNION SELECT p.id, r.image FROM tree JOIN "
            f"parents r ON r.image=tree.id JOIN {IMAGES} p ON p.job=r.job LIMIT ?) SELECT * FROM tree",
            line[-1], MAX_FAMILY + 1,
        )  # fmt: skip
        parents = dict(zip(line, [*line[1:], ""], strict=True))
        parents |= {row["id"]: row["parent"] for row in tree if row["id"] not in parents}
        listed = list(parents)[:MAX_FAMILY]
        rows = self._rows(
            f"SELECT p.*, j.kind, j.recipe, j.result, f.image IS NOT NULL AS favourite FROM {IMAGES} p "
            "JOIN jobs j ON j.id=p.job LEFT JOIN favourites f ON f.image=p.id WHERE j.client=? AND p.swept=0 "
            f"AND p.id IN ({', '.join('?' * len(listed))}) ORDER BY p.made, p.number", client, *listed,
        )  # fmt: skip
        rows = [{**row, "parent": parents[row["id"]]} for row in rows]
        return _with_json(rows), len(parents) > MAX_FAMILY

    def set_favourite(self, id_: str, favourite: bool) -> None:
        """Mark an image as a favourite, or unmark it."""
        change = "INSERT OR IGNORE INTO favourites VALUES (?)"
        with self._change() as db:
            db.execute(change if favourite else "DELETE FROM favourites WHERE image=?", (id_,))

    def oldest_images(self) -> list[dict[str, Any]]:
        """The results that are still there, with their clients."""
        return self._rows(
            f"SELECT p.id, p.bytes, p.made, j.client FROM {IMAGES} p JOIN jobs j ON j.id=p.job "
            "WHERE p.swept=0 ORDER BY p.made"
        )

    def forget(self, ids: Sequence[str]) -> None:
        """Mark images whose files were removed."""
        with self._change() as db:
            db.executemany(f"UPDATE {IMAGES} SET swept=1 WHERE id=?", [(i,) for i in ids])
            db.executemany("DELETE FROM favourites WHERE image=?", [(i,) for i in ids])

    def expire(self, before: float) -> int:
        """Delete jobs that ended before this time without an image left, and their events; returns how many."""
        with self._change() as db:
            rows = db.execute(
                "SELECT id FROM jobs WHERE ended < ? AND NOT EXISTS "
                f"(SELECT 1 FROM {IMAGES} WHERE job=jobs.id AND swept=0)", (before,),
            ).fetchall()  # fmt: skip
            for table, key in (("jobs", "id"), (IMAGES, "job"), (EVENTS, "job"), ("parents", "job")):
                db.executemany(f"DELETE FROM {table} WHERE {key}=?", [(row["id"],) for row in rows])
        if rows:
            self._rows("PRAGMA wal_checkpoint(TRUNCATE)")  # the WAL still has them
        return len(rows)

    # ---- concepts ----------------------------------------------------------------------------

    def add_concept(self, client: str, sha256: str, name: str) -> None:
        with self._change() as db:
            db.execute(
                f"INSERT OR REPLACE INTO {CONCEPTS} VALUES (?,?,?,?)", (client, sha256, name, time.time())
            )

    def concepts_of(self, client: str) -> list[dict[str, Any]]:
        """A client's concepts; of one name the newest is last."""
        return self._rows(f"SELECT * FROM {CONCEPTS} WHERE client=? ORDER BY added, rowid", client)

    def count_concepts(self, key: str) -> int:
        """How many concepts all clients of a key (`admission.key_of`) have together."""
        sql = f"SELECT count(*) AS n FROM {CONCEPTS} WHERE client=? OR client GLOB ?"
        return int(self._rows(sql, key, f"{key} *")[0]["n"])

    def remove_concept(self, client: str, sha256: str) -> None:
        with self._change() as db:
            db.execute(f"DELETE FROM {CONCEPTS} WHERE client=? AND sha256=?", (client, sha256))

    def contents(self) -> set[str]:
        """SHA-256 of every concept that a client owns or an unfinished job needs."""
        owned = {row["sha256"] for row in self._rows(f"SELECT DISTINCT sha256 FROM {CONCEPTS}")}
        return owned.union(*(row["concepts"].values() for row in self.unfinished()))


def _log(db: sqlite3.Connection, ids: Sequence[str], event: str) -> None:
    rows = [(id_, event, time.time()) for id_ in ids]
    db.executemany(f"INSERT INTO {EVENTS} (job, event, at) VALUES (?,?,?)", rows)


def _folded(text: Any) -> str | None:
    """A text without the difference of capitals and small letters; SQLite's lower() knows ASCII alone."""
    return text.casefold() if isinstance(text, str) else None


def _parsed(text: str | None) -> dict[str, Any]:
    """The fields of a recipe or a result; {} where there is none, or it is damaged."""
    try:
        fields = json.loads(text or "{}")
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _read(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its JSON parsed; one that cannot be parsed is empty and marked as `damaged`."""
    parsed: dict[str, Any] = {"warnings": [], "concepts": {}, "recipe": {}, "result": None, "damaged": False}
    for name in ("warnings", "concepts", "recipe", "result"):
        try:
            parsed[name] = json.loads(row[name]) if row[name] else parsed[name]
        except ValueError:  # one job must not keep the others from being read
            parsed["damaged"] = True
    return {**row, **parsed}


def _with_json(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of images with their job's recipe and result parsed."""
    return [{**row, **{name: _parsed(row[name]) for name in ("recipe", "result")}} for row in rows]
