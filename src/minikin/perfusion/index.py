"""SQLite index of folders with many concept files.

    entries = Index().search(folder, "to", category="cat", limit=20)

The index caches metadata from the headers of the files, and their SHA-256 once a caller needs it. It is rebuilt
from the files if it is missing or damaged. A folder is scanned again when its modification time changes, which
happens whenever a file is added, removed, renamed or saved by Minikin. Files of unchanged size and time are not
opened again. A file that another program changes in place is read again at the next scan, or for its hash.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from minikin import strict_json
from minikin.files import cache_folder, is_unicode
from minikin.models import safetensors_header
from minikin.perfusion.strict_safetensors import MAX_DEPTH, MAX_HEADER, MAX_TENSORS

VERSION = 2
RECENT_NS = 2_000_000_000  # a folder that changed so recently may change again within one tick of its clock
MAX_POINTS = 8_000  # characters of a file's operating points
_DELETE = "DELETE FROM concepts WHERE folder=? AND name=?"
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


class IndexEntry(NamedTuple):
    """Metadata of a concept file, not validated; `concept_file.load` validates it.

    points   operating points as JSON
    preview  whether the file has a preview image
    sha256   of the file; "" unless requested
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
    """The index in one SQLite file, by default in the user's cache folder."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "concepts.sqlite"

    def search(
        self,
        folder: Path,
        text: str = "",
        *,
        category: str = "",
        limit: int | None = None,
        offset: int = 0,
        hashed: bool = False,
    ) -> list[IndexEntry]:
        """Concepts of a folder, sorted by name.

        text      part of the name; "" for any
        category  "" for any
        hashed    include each file's current SHA-256; changed files are read again
        """
        where, values = _where(folder, text, category)
        columns = "name, category, architecture, bytes, points, preview, stamp, sha256"
        sql = f"SELECT {columns} FROM concepts WHERE {where} ORDER BY name LIMIT ? OFFSET ?"
        page = (*values, -1 if limit is None else limit, offset)

        def fill(db: sqlite3.Connection) -> None:
            if hashed:
                _hash(db, folder, [(r[0], r[3], *r[6:]) for r in db.execute(sql, page)])

        with self._ready(folder, fill) as db:
            rows = db.execute(sql, page).fetchall()
        return [
            IndexEntry(n, folder / f"{n}.safetensors", c, a, size, points, bool(preview), sha if hashed else "")
            for n, c, a, size, points, preview, _, sha in rows
        ]

    def count(self, folder: Path, text: str = "", *, category: str = "") -> int:
        """Number of results of `search` without a limit."""
        where, values = _where(folder, text, category)
        with self._ready(folder) as db:
            (n,) = db.execute(f"SELECT count(*) FROM concepts WHERE {where}", values).fetchone()
            return int(n)

    def categories(self, folder: Path) -> dict[str, int]:
        """Number of concepts of each category."""
        sql = (
            "SELECT category, count(*) FROM concepts WHERE folder=? AND category IS NOT NULL GROUP BY category"
        )
        with self._ready(folder) as db:
            return dict(db.execute(sql, (_key(folder),)))

    @contextmanager
    def _ready(
        self, folder: Path, fill: Callable[[sqlite3.Connection], None] = lambda db: None
    ) -> Iterator[sqlite3.Connection]:
        """A connection to the index, refreshed for a folder; in memory if its file cannot be written.

        fill  runs after the refresh
        """

        def refreshed(db: sqlite3.Connection) -> sqlite3.Connection:
            _refresh(db, folder)
            fill(db)
            return db

        try:
            db = refreshed(self._connect())
        except (sqlite3.DatabaseError, OSError):
            with suppress(OSError):
                self.path.unlink()
            try:
                db = refreshed(self._connect())
            except (sqlite3.DatabaseError, OSError):  # read-only, or locked for long
                db = refreshed(_with_tables(sqlite3.connect(":memory:")))
        with closing(db):
            yield db

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return _with_tables(sqlite3.connect(self.path, timeout=5))


def _with_tables(db: sqlite3.Connection) -> sqlite3.Connection:
    db.execute("PRAGMA synchronous=OFF")  # a damaged index is rebuilt
    if db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
        db.executescript(f"BEGIN;{_TABLES}PRAGMA user_version={VERSION};COMMIT;")
    return db


def _key(folder: Path) -> str:
    """The folder in the index; a name that is no Unicode is written with escapes."""
    return os.fsencode(folder.resolve()).decode("utf-8", "backslashreplace")


def _where(folder: Path, text: str, category: str) -> tuple[str, list[str]]:
    where, values = "folder=? AND category IS NOT NULL", [_key(folder)]
    if text:
        where += " AND instr(name, ?)"
        values.append(text.lower())
    if category:
        where += " AND category=?"
        values.append(category)
    return where, values


def _refresh(db: sqlite3.Connection, folder: Path) -> int:
    """Update the rows of a folder that changed since its last scan; returns the number of files opened."""
    key = _key(folder)
    stamp = folder.stat().st_mtime_ns if folder.is_dir() else 0
    indexed = db.execute("SELECT stamp FROM folders WHERE folder=?", (key,)).fetchone()
    if indexed and indexed[0] == stamp:
        return 0
    recent = abs(time.time_ns() - stamp) <= RECENT_NS
    rows = db.execute("SELECT name, bytes, stamp FROM concepts WHERE folder=?", (key,))
    before = {name: (size, at) for name, size, at in rows}
    names: set[str] = set()
    changed: list[tuple[object, ...]] = []
    for path, stat in _files(folder) if stamp else ():
        name = Path(path).stem
        names.add(name)
        if before.get(name) != (stat.st_size, stat.st_mtime_ns):
            changed.append((key, name, stat.st_size, stat.st_mtime_ns, *_header_metadata(path), None))
    with db:
        db.executemany(_PUT, changed)
        removed = [(key, name) for name in before.keys() - names]
        db.executemany(_DELETE, removed)
        db.execute("INSERT OR REPLACE INTO folders VALUES (?,?)", (key, -1 if recent else stamp))
    return len(changed)


def _hash(db: sqlite3.Connection, folder: Path, rows: Sequence[tuple[str, int, int, str | None]]) -> None:
    """Compute missing hashes of rows (name, bytes, stamp, hash), and read changed files again."""
    key, changed, removed = _key(folder), [], []
    for name, size, stamp, sha256 in rows:
        path = folder / f"{name}.safetensors"
        try:
            stat = path.stat()
            if sha256 is None or (size, stamp) != (stat.st_size, stat.st_mtime_ns):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                metadata = _header_metadata(str(path))
                changed.append((key, name, stat.st_size, stat.st_mtime_ns, *metadata, digest))
        except OSError:
            removed.append((key, name))
    if changed or removed:
        with db:
            db.executemany(_PUT, changed)
            db.executemany(_DELETE, removed)


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # removed meanwhile
                if entry.name.endswith(".safetensors") and is_unicode(entry.name) and entry.is_file():
                    yield entry.path, entry.stat()


def _header_metadata(path: str) -> tuple[str | None, str | None, str, bool]:
    """Category, architecture, points and presence of a preview, from a file's header.

    Category and architecture are "" for a damaged file, and None for a file that is no concept.
    """
    try:
        with open(path, "rb") as f:
            head = f.read(8 + MAX_HEADER)
    except OSError:
        return None, None, "{}", False
    if b"minikin.format" not in head:
        return None, None, "{}", False
    try:
        (n,) = struct.unpack("<Q", head[:8])
        _, meta = safetensors_header.parse(head[8 : 8 + n], MAX_TENSORS)
        points, preview = meta.get("minikin.points", "{}"), bool(meta.get("modelspec.thumbnail"))
        category, architecture = meta["minikin.category"][:60], meta["minikin.architecture"][:20]
    except (ValueError, LookupError, struct.error):
        return "", "", "{}", False
    try:
        strict_json.loads(points, kind=dict, max_bytes=MAX_POINTS, max_depth=MAX_DEPTH)
    except strict_json.BadJson:
        points = "{}"
    return category, architecture, points, preview
