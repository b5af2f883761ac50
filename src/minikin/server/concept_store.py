"""Concepts for many clients: known by their content, named by each client for itself.

A concept's identity is the SHA-256 of its file, as `sha256sum tom.safetensors` prints it. Each client has
names of its own; the operator's library stands behind them. A request is pinned to contents when it is
taken: by a name's newest content, or by the content it states itself,

    <tom@sha256:3f9a62d1>   <tom@sha256:3f9a62d1@left:0.8>   {"concepts": {"tom": "sha256:3f9a62d1..."}}

(8 digits or more). Contents of other clients cannot be reached, by name or by hash.

A file stays as long as somebody has it on a shelf or a job needs it that has not ended. What was deleted
meanwhile goes with that job's end; copies of the library's concepts go with the next `sweep`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minikin.errors import BadConceptFile, BadRecipe, MinikinError, UnknownName
from minikin.files import atomic_write
from minikin.models.prompt import MAX_CONCEPTS, UNKNOWN_HINT, check_length, concept_tags
from minikin.perfusion import library
from minikin.perfusion.concept import NAME, Concept, check_name
from minikin.perfusion.index import Listed
from minikin.server.engine import Pinned
from minikin.server.errors import Refused, not_found
from minikin.server.job_store import Store
from minikin.server.limits import Limits

log = logging.getLogger(__name__)
KEPT = 512  # parsed concepts in memory, about 100 KB each
_HASH = re.compile(r"(?:sha256:)?([0-9a-f]{8,64})")
_TAG = re.compile(
    r"<(?P<kind>concept:)?(?P<name>[a-z][a-z0-9_-]{0,39})@sha256:(?P<hash>[0-9a-f]{8,64})(?=[@:>])"
)


@dataclass(frozen=True)
class Entry:
    """A concept as a client sees it; `mine` when it can delete it, `listed` when it is the library's."""

    name: str
    sha256: str
    mine: bool
    listed: Listed | None = None


class Shelf:
    """The concepts of all clients, in files named by content."""

    def __init__(self, folder: Path, store: Store, limits: Limits) -> None:
        self.folder, self.store, self.limits = folder, store, limits
        self._lock = threading.RLock()  # over every change of the files, and of whose they are
        self._leaving = set[str]()  # deleted while a job needed them
        self._parsed: OrderedDict[str, Concept] = OrderedDict()
        self._hashes: dict[tuple[Path, int, int], str] = {}  # of the library's files

    def check_room(self, client: str, coming: int = 0) -> None:
        """Raise Refused, 422, when there is no place for one more concept beside those that are coming."""
        if len(self.store.shelved(client)) + coming >= self.limits.concepts_per_client:
            raise Refused(
                f"You have {self.limits.concepts_per_client} concepts here, with those being taught, as many "
                "as this server keeps for one client. Delete some first.", status=422, code="shelf_full",
            )  # fmt: skip

    def put(self, client: str, data: bytes, name: str | None = None, *, taught: bool = False) -> Entry:
        """Keep a concept for a client; one of the same name is no longer its newest.

        taught  here: its place was checked when the work was taken, and it is kept whatever came since
        """
        if len(data) > self.limits.concept:
            raise Refused(
                f"The concept has {len(data)} bytes; at most {self.limits.concept} are taken.",
                status=413, code="concept_too_large",
            )  # fmt: skip
        concept = _parsed(data, "the upload")
        name = check_name(name or concept.name)
        if not taught:
            self.check_room(client)
        with self._lock:
            sha256 = self._keep(data)
            self.store.shelve(client, sha256, name)
            self._leaving.discard(sha256)
        return Entry(name, sha256, True)

    def entries(self, client: str) -> list[Entry]:
        """All contents a client may use; of one name the last is the newest, its own after the library's.

        The library's come from its index: a file is opened once, and again when it has changed.
        """
        common = [Entry(one.name, one.sha256, False, one) for one in library.search(hashed=True)]
        return [*common, *self._own(client)]

    def find(self, client: str, ref: str) -> Entry:
        """By name or `sha256:...`; raises Refused, 404."""
        return self._named(client, ref) or self._find(self.entries(client), ref)

    def data(self, entry: Entry) -> bytes:
        """The file's bytes."""
        with suppress(OSError):
            return self._path(entry.sha256).read_bytes()
        path = library.locate(entry.name)
        data = path.read_bytes() if path is not None else b""
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise not_found("concept", entry.name)
        return data

    def delete(self, client: str, ref: str) -> list[Entry]:
        """Remove what a name or hash stands for, every content of that name; raises Refused, 404."""
        mine = self._own(client)
        gone = [e for e in mine if e.name == ref] or [self._find(mine, ref)]
        with self._lock:
            for entry in gone:
                self.store.unshelve(client, entry.sha256)
                self._leaving.add(entry.sha256)
        self.release(entry.sha256 for entry in gone)
        return gone

    def release(self, contents: Iterable[str]) -> None:
        """Nothing that had these contents in hand needs them any more: remove what was deleted meanwhile."""
        with self._lock:
            leaving = self._leaving.intersection(contents)
            if leaving:
                self._remove(leaving - self.store.contents())

    def sweep(self) -> int:
        """Remove files that nobody has and no job needs; how many."""
        with self._lock:
            unwanted = {path.stem for path in self.folder.glob("*.safetensors")} - self.store.contents()
            self._remove(unwanted)
        return len(unwanted)

    def _remove(self, contents: set[str]) -> None:
        for sha256 in contents:
            self._parsed.pop(sha256, None)
            try:
                self._path(sha256).unlink(missing_ok=True)
            except OSError as e:  # the next sweep tries again
                log.warning("a concept that was deleted is still there: %s", e.strerror)
            else:
                self._leaving.discard(sha256)

    # ---- pinning -----------------------------------------------------------------------------

    def pin(
        self, client: str, values: Mapping[str, Any], asked: Mapping[str, str]
    ) -> tuple[dict[str, Any], dict[str, Pinned]]:
        """A recipe's values without hashes in its prompts, and the contents of the concepts they name.

        asked  hashes by name, beside those inside the prompts
        Raises UnknownName, BadRecipe, or Refused (404) for a content that this client does not have.
        """
        told, wanted = dict(values), dict(asked)
        for field in ("prompt", "negative"):
            if isinstance(told.get(field), str):
                check_length(told[field])
                told[field] = _TAG.sub(lambda m: _taken(m, wanted), told[field])
        texts = f"{told.get('prompt') or ''} {told.get('negative') or ''}"
        names = concept_tags(texts)
        if len(names) > MAX_CONCEPTS:
            raise BadRecipe(f"At most {MAX_CONCEPTS} concepts fit in one prompt.")
        if not names:
            return told, {}
        pinned = {}
        for name in names:
            entry = self.find(client, wanted[name]) if name in wanted else self._named(client, name)
            if entry is None:
                known = [*library.near(name), *(e.name for e in self._own(client))]
                raise UnknownName("concept", name, known, UNKNOWN_HINT)
            pinned[name] = self.pinned(name, entry)
        return told, pinned

    def pinned(self, name: str, entry: Entry) -> Pinned:
        """This content under this name; its file is then here, until a sweep finds that no job needs it."""
        with self._lock:
            if entry.sha256 not in self._parsed or not self._path(entry.sha256).exists():
                data = self.data(entry)
                if not self._path(entry.sha256).exists():
                    self._keep(data)
                self._parsed[entry.sha256] = _parsed(data, f"concept '{name}'")
                while len(self._parsed) > KEPT:
                    self._parsed.popitem(last=False)
            concept = self._parsed[entry.sha256]
        return Pinned(
            entry.sha256, concept if concept.name == name else replace(concept, name=check_name(name))
        )

    @contextmanager
    def standing(self, pinned: Mapping[str, Pinned]) -> Iterator[None]:
        """Inside, these contents' files are here and nobody takes them away: for a job to be written down that
        needs them from then on. Raises Refused, 404, for one that was deleted since it was pinned."""
        with self._lock:
            for name, one in pinned.items():
                if not self._path(one.sha256).exists():
                    self._keep(self.data(Entry(name, one.sha256, False)))
            yield

    def again(self, concepts: Mapping[str, str]) -> dict[str, Pinned]:
        """Pinned contents by name and hash, for a job that was taken before a restart."""
        try:
            return {n: self.pinned(n, Entry(n, sha, False)) for n, sha in concepts.items()}
        except MinikinError as e:
            raise BadConceptFile(f"A concept of this job is no longer there: {e}") from e

    def _own(self, client: str) -> list[Entry]:
        return [Entry(r["name"], r["sha256"], True) for r in self.store.shelved(client)]

    def _named(self, client: str, name: str) -> Entry | None:
        """The newest content of a name, without a look at any other; None when there is none."""
        own = [e for e in self._own(client) if e.name == name]
        path = library.locate(name) if not own and NAME.fullmatch(name) else None
        return own[-1] if own else Entry(name, self._hash(path), False) if path is not None else None

    def _find(self, entries: list[Entry], ref: str) -> Entry:
        named = [e for e in entries if e.name == ref]
        if named:
            return named[-1]
        match = _HASH.fullmatch(ref)
        found = {e.sha256: e for e in entries if match and e.sha256.startswith(match[1])}
        if len(found) > 1:
            raise BadRecipe(f"'{ref}' begins {len(found)} concepts' hashes; give more digits.")
        if not found:
            raise not_found("concept", ref)
        return next(iter(found.values()))

    def _keep(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        atomic_write(self._path(sha256), data)
        return sha256

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.safetensors"

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        key = (path.resolve(), stat.st_mtime_ns, stat.st_size)
        if key not in self._hashes:
            self._hashes[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._hashes[key]


def _parsed(data: bytes, what: str) -> Concept:
    from minikin.perfusion.concept_file import from_bytes  # needs PyTorch: not before there is a concept

    return from_bytes(data, what)


def _taken(m: re.Match[str], wanted: dict[str, str]) -> str:
    """The tag without its hash, which goes into `wanted`."""
    name, sha256 = m["name"], m["hash"]
    if wanted.get(name, sha256).removeprefix("sha256:") != sha256:
        raise BadRecipe(
            f"The prompt names two contents of '{name}'. Give one of them another name when uploading."
        )
    wanted[name] = sha256
    return f"<{m['kind'] or ''}{name}"
