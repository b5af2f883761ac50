"""Run log of `minikin fleet paint` (manifest.jsonl): one JSON object per line, append-only.

    {"manifest": 1, "base": "tiny", ..., "fingerprint": "9f3c..."}             the run, first
    {"line": 7, "id": null, "asked": "c1d4...", "pictures": [{"seed": 7, "file": "a1/a1b2....png",  # word: key
     "sha256": "...", "bytes": 61234}]}
    {"line": 8, "id": null, "asked": "07fe...", "error": {"code": "unknown_name", "message": "..."}}

Records are in the order in which lines were finished. A line is done when the images of its record exist; one
with an error is tried again by the next run, and then the later record counts. Finished lines take 8 bytes each
in memory: 8 MB for a million prompts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from minikin import strict_json
from minikin.cluster.prompts import PromptLine
from minikin.errors import BadRecipe, StorageError

VERSION, MAX_LINE = 1, 4 << 20  # bytes: 1,000 images of a line take 200 KB


class RunLog:
    """The run log in a run's folder; written by one process alone.

    run  settings that must be the same when the run is resumed
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / "manifest.jsonl"
        self.head, self.fingerprint = {"manifest": VERSION, **run}, ""
        self._pending: list[Mapping[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self.done = self._read() if self.path.exists() else _sorted([])
            self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        except OSError as e:
            raise StorageError(f"{self.path} cannot be written: {e.strerror}.") from e

    def has(self, line: PromptLine) -> bool:
        """Whether a line was done before this run started."""
        key = np.uint64(_key(line.number, line.digest))
        at = int(np.searchsorted(self.done, key))
        return at < len(self.done) and bool(self.done[at] == key)

    def add(self, records: Sequence[Mapping[str, Any]], fingerprint: str) -> None:
        """Append records in one write. Raises StorageError, and BadRecipe when another base was used before."""
        if not fingerprint:  # of lines that killed their workers: the base's fingerprint is not known yet
            self._pending += records
            return
        records, self._pending = [*self._pending, *records], []
        if self.fingerprint not in ("", fingerprint):
            raise BadRecipe(
                f"{self.folder} holds images of {self.head['base']} {self.fingerprint[:8]}; this worker's "
                f"is {fingerprint[:8]}. Use the same base on every machine, or another --out."
            )
        try:
            if not self.fingerprint:
                self._restart()
                records = [{**self.head, "fingerprint": fingerprint}, *records]
            self._write(records)
            self.fingerprint = fingerprint
        except OSError as e:
            raise StorageError(f"{self.path} was not written: {e.strerror}. The run goes on from here.") from e

    def close(self) -> None:
        """Raises StorageError."""
        try:
            with self._file:
                if self._pending and not self.fingerprint:  # every line killed its workers
                    self._restart()
                    self._write([{**self.head, "fingerprint": ""}, *self._pending])
                os.fsync(self._file.fileno())
        except OSError as e:
            raise StorageError(f"{self.path} was not written: {e.strerror}. The run goes on from here.") from e

    def _restart(self) -> None:
        """Empty the log of a run that has only errors: its lines were tried again and are recorded again."""
        self._file.truncate(0)

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        self._file.write(
            text.encode("utf-8", "backslashreplace").decode()
        )  # half a surrogate: as JSON escapes it
        self._file.flush()

    def _read(self) -> np.ndarray:
        records = read(self.path)
        header = next(records, None)
        if header is None:
            return _sorted([])
        self.fingerprint, head = str(header.pop("fingerprint", "")), self.head
        differ = [key for key in {**header, **head} if header.get(key) != head.get(key)]
        if differ:
            key = differ[0]
            raise BadRecipe(
                f"{self.folder} holds another run: {key} is {header.get(key)!r} there, {head.get(key)!r} here. "
                "Use the same settings, or another --out."
            )
        return _sorted(_key(r["line"], r["asked"]) for r in records if self._is_done(r))

    def _is_done(self, record: Mapping[str, Any]) -> bool:
        """Whether the images of a record, at least one, are there; an edited log must not skip a line."""
        images = record.get("pictures", [])  # word: key of the file
        try:
            return bool(images) and all(
                not Path(i["file"]).is_absolute() and (self.folder / i["file"]).stat().st_size == i["bytes"]
                for i in images
            )
        except (OSError, ValueError):
            return False


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a run log, the run's first; raises BadRecipe for a file that is no run log."""
    with open(path, "rb") as f:
        for number, text in enumerate(iter(lambda: f.readline(MAX_LINE), b""), 1):
            try:
                record = strict_json.loads(text, kind=dict, max_bytes=MAX_LINE)
                sound = "manifest" in record if number == 1 else _is_sound(record)
            except strict_json.BadJson:
                sound = False
            if not sound:
                raise BadRecipe(f"{path} is not the log of a run (line {number}). Choose another --out.")
            yield record


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether a record has the fields of a line, of their types."""
    images = record.get("pictures", [])  # word: key of the file
    return (
        type(record.get("line")) is int
        and isinstance(digest := record.get("asked"), str)
        and re.fullmatch(r"[0-9a-f]{16,64}", digest) is not None
        and isinstance(images, list)
        and all(
            isinstance(i, dict) and isinstance(i.get("file"), str) and type(i.get("bytes")) is int
            for i in images
        )
    )


def _cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process left."""
    if not path.exists():
        return
    with open(path, "rb+") as f:
        end = f.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 65536)
            f.seek(begin)
            newline = f.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        f.truncate(end)


def _key(line: int, digest: str) -> int:
    """Hash of a line's number and request, 64 bits."""
    return (int(digest[:16], 16) ^ (line * 0x9E3779B97F4A7C15)) & 0xFFFF_FFFF_FFFF_FFFF


def _sorted(keys: Iterable[int]) -> np.ndarray:
    return np.sort(np.fromiter(keys, np.uint64))
