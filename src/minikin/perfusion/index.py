"""An index of folders with many concepts: SQLite, rebuilt from the files whenever it is missing or wrong.

    found = Index().search(folder, "to", category="cat", limit=20)

The files are the truth and this is a cache of what their headers say, and of their SHA-256 once it was asked
for. A folder is looked through again
when its own time stamp changed, which every file that is added, removed, renamed or saved by Minikin does
to it; files of an unchanged size and time are not opened again. A file that another program changes in
place is seen with the next change of the folder, or where its hash is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from minikin.files import cache_folder
from minikin.perfusion.strict_safetensors import MAX_HEADER

VERSION = 2
SETTLED_NS = 2_000_000_000  # a folder that changed so recently may change again within one tick of its clock
MAX_POINTS = 8_000  # characters of a file's operating points
_PUT = "INSERT OR REPLACE INTO concepts VALUES (?,?,?,?,?,?,?,?,?)"
_TABLES = """
DROP TABLE IF EXISTS concepts; DROP TABLE IF EXISTS folders;
CREATE TABLE folders (folder TEXT PRIMARY KEY, stamp INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE concepts (
    folder TEXT NOT NULL, name TEXT NOT NULL, bytes INTEGER NOT NULL, stamp INTEGER NOT NULL,
    category TEXT, architecture TEXT, points TEXT, preview INTEGER, sha256 TEXT,
    PRIMARY KEY (folder, name)) WITHOUT ROWID;
CREATE INDEX by_category ON concepts (folder, category, name);
"""


class Listed(NamedTuple):
    """A concept file as the index knows it; what is inside is checked when it is loaded.

    points   its operating points, JSON as it is in the file
    preview  whether there is a small image inside
    sha256   of the file; "" unless it was asked for
    """

    name: str
    path: Path
    category: str
    architecture: str
    bytes: int
    points: str = "{}"
    preview: bool = False
    sha256: str = ""


class Index:
    """The index in one file; `path` None for the user's cache folder."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "concepts.sqlite"

    def search(
        self, folder: Path, text: str = "", *, category: str = "", limit: int | None = None, offset: int = 0,
        hashed: bool = False,
    ) -> list[Listed]:  # fmt: skip
        """Concepts of a folder by name whose name holds `text`, of this category, in order.

        hashed  with each file's SHA-256, as the files are at this moment: those that changed are read again
        """
        where, values = _where(folder, text, category)
        told = "name, category, architecture, bytes, points, preview, stamp, sha256"
        sql = f"SELECT {told} FROM concepts WHERE {where} ORDER BY name LIMIT ? OFFSET ?"
        page = (*values, -1 if limit is None else limit, offset)

        def fill(db: sqlite3.Connection) -> None:
            if hashed:
                _hash(db, folder, [(r[0], r[3], *r[6:]) for r in db.execute(sql, page)])

        with self._ready(folder, fill) as db:
            rows = db.execute(sql, page).fetchall()
        return [
            Listed(n, folder / f"{n}.safetensors", c, a, size, measured, bool(seen), sha if hashed else "")
            for n, c, a, size, measured, seen, _, sha in rows
        ]

    def count(self, folder: Path, text: str = "", *, category: str = "") -> int:
        """How many `search` would find without a limit."""
        where, values = _where(folder, text, category)
        with self._ready(folder) as db:
            (n,) = db.execute(f"SELECT count(*) FROM concepts WHERE {where}", values).fetchone()
            return int(n)

    def categories(self, folder: Path) -> dict[str, int]:
        """How many concepts there are of each category."""
        sql = (
            "SELECT category, count(*) FROM concepts WHERE folder=? AND category IS NOT NULL GROUP BY category"
        )
        with self._ready(folder) as db:
            return dict(db.execute(sql, (str(folder.resolve()),)))

    @contextmanager
    def _ready(
        self, folder: Path, fill: Callable[[sqlite3.Connection], None] = lambda db: None
    ) -> Iterator[sqlite3.Connection]:  # fmt: skip
        """The index, up to date for a folder, after `fill`; in memory where its file cannot be written."""

        def ready(db: sqlite3.Connection) -> sqlite3.Connection:
            _refresh(db, folder)
            fill(db)
            return db

        try:
            db = ready(self._opened())
        except (sqlite3.DatabaseError, OSError):
            with suppress(OSError):
                self.path.unlink()
            try:
                db = ready(self._opened())
            except (sqlite3.DatabaseError, OSError):  # read-only, or locked by somebody for long
                db = ready(_prepared(sqlite3.connect(":memory:")))
        with closing(db):
            yield db

    def _opened(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return _prepared(sqlite3.connect(self.path, timeout=5))


def _prepared(db: sqlite3.Connection) -> sqlite3.Connection:
    db.execute("PRAGMA synchronous=OFF")  # after a power cut it is made again
    if db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
        db.executescript(f"BEGIN;{_TABLES}PRAGMA user_version={VERSION};COMMIT;")
    return db


def _where(folder: Path, text: str, category: str) -> tuple[str, list[str]]:
    where, values = "folder=? AND category IS NOT NULL", [str(folder.resolve())]
    if text:
        where += " AND instr(name, ?)"
        values.append(text.lower())
    if category:
        where += " AND category=?"
        values.append(category)
    return where, values


def _refresh(db: sqlite3.Connection, folder: Path) -> int:
    """Take up what changed in a folder since it was last looked through; how many files were opened."""
    key = str(folder.resolve())
    stamp = folder.stat().st_mtime_ns if folder.is_dir() else 0
    known = db.execute("SELECT stamp FROM folders WHERE folder=?", (key,)).fetchone()
    if known and known[0] == stamp:
        return 0
    settled = abs(time.time_ns() - stamp) > SETTLED_NS
    before = {n: (size, at) for n, size, at in db.execute(
        "SELECT name, bytes, stamp FROM concepts WHERE folder=?", (key,)
    )}  # fmt: skip
    there: set[str] = set()
    new: list[tuple[object, ...]] = []
    for path, found in _files(folder) if stamp else ():
        name = Path(path).stem
        there.add(name)
        if before.get(name) != (found.st_size, found.st_mtime_ns):
            new.append((key, name, found.st_size, found.st_mtime_ns, *_facts(path), None))
    with db:
        db.executemany(_PUT, new)
        gone = [(key, name) for name in before.keys() - there]
        db.executemany("DELETE FROM concepts WHERE folder=? AND name=?", gone)
        db.execute("INSERT OR REPLACE INTO folders VALUES (?,?)", (key, stamp if settled else -1))
    return len(new)


def _hash(
    db: sqlite3.Connection, folder: Path, rows: Sequence[tuple[str, int, int, str | None]]
) -> None:  # fmt: skip
    """Fill in the hashes of these rows (name, bytes, stamp, hash); what has changed is looked at again."""
    key, changed, gone = str(folder.resolve()), [], []
    for name, size, stamp, sha256 in rows:
        path = folder / f"{name}.safetensors"
        try:
            found = path.stat()
            if sha256 is None or (size, stamp) != (found.st_size, found.st_mtime_ns):
                told = hashlib.sha256(path.read_bytes()).hexdigest()
                changed.append((key, name, found.st_size, found.st_mtime_ns, *_facts(str(path)), told))
        except OSError:
            gone.append((key, name))
    if changed or gone:
        with db:
            db.executemany(_PUT, changed)
            db.executemany("DELETE FROM concepts WHERE folder=? AND name=?", gone)


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # removed meanwhile
                if entry.name.endswith(".safetensors") and entry.is_file():
                    yield entry.path, entry.stat()


def _facts(path: str) -> tuple[str | None, str | None, str, bool]:
    """Category, architecture, points and whether there is a preview, out of a file's header; "" of a damaged
    one, None for what is no concept."""
    try:
        with open(path, "rb") as f:
            head = f.read(8 + MAX_HEADER)
    except OSError:
        return None, None, "{}", False
    if b"minikin.format" not in head:
        return None, None, "{}", False
    try:
        (n,) = struct.unpack("<Q", head[:8])
        meta = json.loads(head[8 : 8 + n])["__metadata__"]
        told, seen = str(meta.get("minikin.points", "{}")), bool(meta.get("modelspec.thumbnail"))
        category, architecture = str(meta["minikin.category"])[:60], str(meta["minikin.architecture"])[:20]
        return category, architecture, told if len(told) <= MAX_POINTS else "{}", seen
    except (ValueError, LookupError, TypeError, struct.error, RecursionError):
        return "", "", "{}", False
