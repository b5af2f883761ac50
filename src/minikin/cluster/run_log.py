"""The manifest of a run: one JSON object a line, added to and never changed.

    {"manifest": 1, "base": "tiny", ..., "fingerprint": "9f3c..."}             the run, first
    {"line": 7, "id": null, "asked": "c1d4...", "images": [{"seed": 7, "file": "a1/a1b2....png",
     "sha256": "...", "bytes": 61234}]}
    {"line": 8, "id": null, "asked": "07fe...", "error": {"code": "unknown_name", "message": "..."}}

Lines come in the order in which work ended. A line whose record has images that are there is done; one
with an error is tried again by the next run, and then the later record counts. Of what is done 8 bytes a line
are kept in memory: 8 MB for a million prompts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from minikin.cluster.prompts import Line
from minikin.errors import BadRecipe, StorageError

VERSION = 1


class Manifest:
    """The manifest in a run's folder; written by one process alone.

    run  what must be the same for the run to go on
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / "manifest.jsonl"
        self.head, self.fingerprint = {"manifest": VERSION, **run}, ""
        self._held: list[Mapping[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self.done = self._read() if self.path.exists() else _sorted([])
            self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        except OSError as e:
            raise StorageError(f"{self.path} cannot be written: {e.strerror}.") from e

    def has(self, line: Line) -> bool:
        """Whether a line was done before this run."""
        key = np.uint64(_key(line.number, line.asked))
        at = int(np.searchsorted(self.done, key))
        return at < len(self.done) and bool(self.done[at] == key)

    def add(self, records: Sequence[Mapping[str, Any]], fingerprint: str) -> None:
        """One write for all. Raises StorageError, and BadRecipe when another base painted what is there."""
        if not fingerprint:  # of lines that killed their workers: nobody knows yet who paints
            self._held += records
            return
        records, self._held = [*self._held, *records], []
        if self.fingerprint not in ("", fingerprint):
            raise BadRecipe(
                f"{self.folder} holds images of {self.head['base']} {self.fingerprint[:8]}; this worker's "
                f"is {fingerprint[:8]}. Use the same base on every machine, or another --out."
            )
        try:
            if not self.fingerprint:
                self._anew()
                records = [{**self.head, "fingerprint": fingerprint}, *records]
            self._write(records)
            self.fingerprint = fingerprint
        except OSError as e:
            raise StorageError(f"{self.path} was not written: {e.strerror}. The run goes on from here.") from e

    def close(self) -> None:
        """Raises StorageError."""
        try:
            with self._file:
                if self._held and not self.fingerprint:  # every line killed its workers
                    self._anew()
                    self._write([{**self.head, "fingerprint": ""}, *self._held])
                os.fsync(self._file.fileno())
        except OSError as e:
            raise StorageError(f"{self.path} was not written: {e.strerror}. The run goes on from here.") from e

    def _anew(self) -> None:
        """Of a run that nobody painted in only errors are told: they were tried again, and are told anew."""
        self._file.truncate(0)

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        self._file.write(
            text.encode("utf-8", "backslashreplace").decode()
        )  # half a surrogate: as JSON escapes it
        self._file.flush()

    def _read(self) -> np.ndarray:
        records = read(self.path)
        theirs = next(records, None)
        if theirs is None:
            return _sorted([])
        self.fingerprint, head = str(theirs.pop("fingerprint", "")), self.head
        differ = [k for k in {**theirs, **head} if theirs.get(k) != head.get(k)]
        if differ:
            k = differ[0]
            raise BadRecipe(
                f"{self.folder} holds another run: {k} is {theirs.get(k)!r} there and {head.get(k)!r} here. "
                "Use the same settings, or another --out."
            )
        return _sorted(_key(r["line"], r["asked"]) for r in records if self._stands(r))

    def _stands(self, record: Mapping[str, Any]) -> bool:
        for one in record.get("pictures", [None]):
            try:
                if one is None or (self.folder / one["file"]).stat().st_size != one["bytes"]:
                    return False
            except OSError:
                return False
        return True


def read(path: Path) -> Iterator[dict[str, Any]]:
    """A manifest's objects, the run's first; raises BadRecipe for a file that is none."""
    with open(path, encoding="utf-8") as f:
        for number, text in enumerate(f, 1):
            try:
                found = json.loads(text)
                _ = found["manifest" if number == 1 else "line"]
            except (ValueError, KeyError, TypeError):
                raise BadRecipe(
                    f"{path} is no manifest of a run (line {number}). Choose another --out."
                ) from None
            yield found


def _cut_torn_line(path: Path) -> None:
    """What a killed process did not finish writing was not said."""
    if not path.exists():
        return
    with open(path, "rb+") as f:
        end = f.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 65536)
            f.seek(begin)
            found = f.read(end - begin).rfind(b"\n")
            if found >= 0:
                end = begin + found + 1
                break
            end = begin
        f.truncate(end)


def _key(line: int, asked: str) -> int:
    """A line and what it asks for, in 64 bits."""
    return (int(asked[:16], 16) ^ (line * 0x9E3779B97F4A7C15)) & 0xFFFF_FFFF_FFFF_FFFF


def _sorted(keys: Iterable[int]) -> np.ndarray:
    return np.sort(np.fromiter(keys, np.uint64))
