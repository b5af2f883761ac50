"""Concept store: the concepts of all clients, identified by content, named by each client for itself.

A concept's identity is the SHA-256 of its file, as `sha256sum tom.safetensors` prints it. Each client has
its own names, which take precedence over the operator's library. A request is pinned to contents when it is
accepted: to the newest content of a name, or to the content it states itself,

    <tom@sha256:3f9a62d1>   <tom@sha256:3f9a62d1@left:0.8>   {"concepts": {"tom": "sha256:3f9a62d1..."}}

(8 digits or more). Concepts of other clients cannot be reached, by name or by hash.

A file stays as long as a client owns it or an unfinished job needs it. A concept deleted meanwhile is removed
when that job ends; copies of the library's concepts are removed by the next `sweep`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minikin.errors import BadConceptFile, BadRecipe, MinikinError, UnknownName
from minikin.files import atomic_write
from minikin.models.prompt import (
    MAX_CONCEPTS,
    UNKNOWN_HINT,
    check_length,
    concept_tags,
    plain_words,
    word_for_concept,
)
from minikin.perfusion import library
from minikin.perfusion.concept import NAME, Concept, check_name
from minikin.perfusion.index import IndexEntry
from minikin.printable import escaped
from minikin.server.admission import LOCAL, key_of
from minikin.server.engine import PinnedConcept
from minikin.server.errors import RequestRejected, not_found
from minikin.server.job_store import JobStore
from minikin.server.limits import Limits

log = logging.getLogger(__name__)
MAX_PARSED, MAX_PARSED_BYTES = 512, 64 << 20  # concepts in memory, some 100 KB each; the newest always stays
MAX_HASHES = 20_000  # of the library's files
MAX_WORDS = 300  # of a prompt that are looked up
_HASH = re.compile(r"(?:sha256:)?([0-9a-f]{8,64})")
_TAG = re.compile(
    r"<(?P<kind>concept:)?(?P<name>[a-z][a-z0-9_-]{0,39})@sha256:(?P<hash>[0-9a-f]{8,64})(?=[@:>])"
)


@dataclass(frozen=True)
class Entry:
    """A concept as a client sees it; `mine` when it can delete it, `listed` when it is in the library.

    earlier  the name that the concept it took the place of has now; "" where there was none
    """

    name: str
    sha256: str
    mine: bool
    listed: IndexEntry | None = None
    earlier: str = ""


class ConceptStore:
    """The concepts of all clients, in files named by content.

    one_library  one person uses this server, on their own machine: what they add goes into their library
    """

    def __init__(self, folder: Path, store: JobStore, limits: Limits, *, one_library: bool = False) -> None:
        self.folder, self.store, self.limits, self.one_library = folder, store, limits, one_library
        self._lock = threading.RLock()  # for every change of files and owners
        self._deleted = set[str]()  # while a job needed them
        self._parsed: OrderedDict[str, Concept] = OrderedDict()
        self._hashes: dict[tuple[Path, int, int], str] = {}  # of the library's files

    def check_quota(self, client: str, teaching: Sequence[str] = ()) -> None:
        """Raise RequestRejected (422) when one more concept would be too many for a client or for its key.

        teaching  the clients of all teachings that have not ended
        """
        if self.one_library:
            return
        key, limits = key_of(client), self.limits
        of_client = len(self.store.concepts_of(client)) + teaching.count(client)
        of_key = self.store.count_concepts(key) + sum(key_of(other) == key for other in teaching)
        for owner, count, most in (
            ("client", of_client, limits.concepts_per_client),
            ("key", of_key, max(limits.concepts_per_key, limits.concepts_per_client)),
        ):
            if count >= most:
                raise RequestRejected(
                    f"Your {owner} has {count} concepts here, including those being taught; this server keeps "
                    f"at most {most}. Delete some first.",
                    status=422, code="concept_quota_exceeded",
                )  # fmt: skip

    def put(self, client: str, data: bytes, name: str | None = None, *, check_quota: bool = True) -> Entry:
        """Store a concept for a client; it becomes the newest of its name.

        check_quota  False for one that was taught here: the quota was checked when that job was accepted
        """
        if len(data) > self.limits.concept:
            raise RequestRejected(
                f"The concept has {len(data)} bytes; at most {self.limits.concept} are taken.",
                status=413, code="concept_too_large",
            )  # fmt: skip
        concept = _parsed(data, "the upload")
        name = check_name(name or concept.name)
        if check_quota:
            self.check_quota(client)
        if self.one_library:
            with self._lock:
                path, earlier = library.put_newest(data, name)
            return Entry(path.stem, hashlib.sha256(data).hexdigest(), True, earlier=earlier)
        with self._lock:
            sha256 = self._write(data)
            self.store.add_concept(client, sha256, name)
            self._deleted.discard(sha256)
        return Entry(name, sha256, True)

    def entries(self, client: str) -> list[Entry]:
        """All concepts a client may use, the library's first; of one name the last is the newest.

        The library's come from its index: a file is opened once, and again when it has changed.
        """
        personal = library.library_folder() if self.one_library else None
        shared = [
            Entry(file.name, file.sha256, file.path.parent == personal, file)
            for file in library.search(hashed=True)
        ]
        return [*shared, *self._owned(client)]

    def find(self, client: str, ref: str) -> Entry:
        """A concept by name or `sha256:...`; raises RequestRejected (404)."""
        return self._newest(client, ref) or self._find(self.entries(client), ref)

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
        """Delete every content of a name, or the content with a hash; raises RequestRejected (404)."""
        in_library = [e for e in self.entries(client) if e.mine and e.listed] if self.one_library else []
        if any(ref in (e.name, e.sha256, f"sha256:{e.sha256}") for e in in_library):
            entry = self._find(in_library, ref)
            library.remove(entry.name)
            return [entry]
        owned = self._owned(client)
        deleted = [e for e in owned if e.name == ref] or [self._find(owned, ref)]
        with self._lock:
            for entry in deleted:
                self.store.remove_concept(client, entry.sha256)
                self._deleted.add(entry.sha256)
        self.release(entry.sha256 for entry in deleted)
        return deleted

    def share(self) -> None:
        """Move what clients without a name of their own have here into the library, if there is only that."""
        if not self.one_library:
            return
        for entry in self._owned(LOCAL):
            library.put_newest(self.data(entry), entry.name)
            self.store.remove_concept(LOCAL, entry.sha256)

    def release(self, contents: Iterable[str]) -> None:
        """Called when a job no longer needs these contents: removes those that were deleted meanwhile."""
        with self._lock:
            unneeded = self._deleted.intersection(contents)
            if unneeded:
                self._remove(unneeded - self.store.contents())

    def sweep(self) -> int:
        """Remove files that no client owns and no job needs; returns how many."""
        with self._lock:
            unneeded = {path.stem for path in self.folder.glob("*.safetensors")} - self.store.contents()
            self._remove(unneeded)
        return len(unneeded)

    def _remove(self, contents: set[str]) -> None:
        for sha256 in contents:
            self._parsed.pop(sha256, None)
            try:
                self._path(sha256).unlink(missing_ok=True)
            except OSError as e:  # the next sweep tries again
                log.warning("a concept that was deleted is still there: %s", e.strerror)
            else:
                self._deleted.discard(sha256)

    # ---- pinning -----------------------------------------------------------------------------

    def pin(
        self, client: str, values: Mapping[str, Any], hashes: Mapping[str, str]
    ) -> tuple[dict[str, Any], dict[str, PinnedConcept]]:
        """A recipe's fields without hashes in its prompts, and the concepts that these prompts name.

        hashes  by name, besides those inside the prompts
        Raises UnknownName, BadRecipe, or RequestRejected (404) for a content that this client does not have.
        """
        fields, named_hashes = dict(values), dict(hashes)
        for field in ("prompt", "negative"):
            if isinstance(fields.get(field), str):
                check_length(fields[field])
                fields[field] = _TAG.sub(lambda m: _strip_hash(m, named_hashes), fields[field])
        texts = f"{fields.get('prompt') or ''} {fields.get('negative') or ''}"
        names = concept_tags(texts)
        if len(names) > MAX_CONCEPTS:
            raise BadRecipe(f"At most {MAX_CONCEPTS} concepts fit in one prompt.")
        if not names:
            return fields, {}
        pinned = {}
        for name in names:
            entry = (
                self.find(client, named_hashes[name]) if name in named_hashes else self._newest(client, name)
            )
            if entry is None:
                candidates = [*library.similar_names(name), *(e.name for e in self._owned(client))]
                raise UnknownName("concept", name, candidates, UNKNOWN_HINT)
            pinned[name] = self.pinned(name, entry)
        return fields, pinned

    def notes_on_words(self, client: str, prompt: str) -> list[str]:
        """Notes for words of a prompt that are names of concepts which the client may use."""
        owned = {entry.name for entry in self._owned(client)}
        words = sorted(plain_words(prompt) - set(concept_tags(prompt)))[:MAX_WORDS]
        return [
            word_for_concept(word)
            for word in words
            if NAME.fullmatch(word) and (word in owned or library.locate(word))
        ]

    def pinned(self, name: str, entry: Entry) -> PinnedConcept:
        """The concept under this name; its file is then in this store until a sweep finds it unneeded."""
        with self._lock:
            if entry.sha256 not in self._parsed or not self._path(entry.sha256).exists():
                data = self.data(entry)
                if not self._path(entry.sha256).exists():
                    self._write(data)
                self._parsed[entry.sha256] = _parsed(data, f"concept '{name}'")
                self._shrink()
            self._parsed.move_to_end(entry.sha256)
            concept = self._parsed[entry.sha256]
        return PinnedConcept(
            entry.sha256, concept if concept.name == name else replace(concept, name=check_name(name))
        )

    def _shrink(self) -> None:
        """Forget the concepts that were used longest ago, where all are too many or too large."""
        size = sum(concept.memory_bytes for concept in self._parsed.values())
        while len(self._parsed) > MAX_PARSED or (size > MAX_PARSED_BYTES and len(self._parsed) > 1):
            size -= self._parsed.popitem(last=False)[1].memory_bytes

    @contextmanager
    def files_locked(self, pinned: Mapping[str, PinnedConcept]) -> Iterator[None]:
        """Inside, the files of these concepts exist and cannot be removed, until the job store has the job that
        needs them. Raises RequestRejected (404) for one that was deleted since it was pinned."""
        with self._lock:
            for name, concept in pinned.items():
                if not self._path(concept.sha256).exists():
                    self._write(self.data(Entry(name, concept.sha256, False)))
            yield

    def reload(self, concepts: Mapping[str, str]) -> dict[str, PinnedConcept]:
        """Pinned concepts by name and hash, for a job that was accepted before a restart."""
        try:
            return {n: self.pinned(n, Entry(n, sha, False)) for n, sha in concepts.items()}
        except MinikinError as e:
            raise BadConceptFile(f"A concept of this job is no longer there: {e}") from e

    def _owned(self, client: str) -> list[Entry]:
        return [Entry(r["name"], r["sha256"], True) for r in self.store.concepts_of(client)]

    def _newest(self, client: str, name: str) -> Entry | None:
        """The newest content of a name, without listing any other; None when there is none."""
        owned = [e for e in self._owned(client) if e.name == name]
        path = library.locate(name) if not owned and NAME.fullmatch(name) else None
        return owned[-1] if owned else Entry(name, self._hash(path), False) if path is not None else None

    def _find(self, entries: list[Entry], ref: str) -> Entry:
        same_name = [e for e in entries if e.name == ref]
        if same_name:
            return same_name[-1]
        match = _HASH.fullmatch(ref)
        matches = {e.sha256: e for e in entries if match and e.sha256.startswith(match[1])}
        if len(matches) > 1:
            raise BadRecipe(f"'{ref}' begins {len(matches)} concepts' hashes; give more digits.")
        if not matches:
            raise not_found("concept", ref)
        return next(iter(matches.values()))

    def _write(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        atomic_write(self._path(sha256), data)
        return sha256

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.safetensors"

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        key = (path.resolve(), stat.st_mtime_ns, stat.st_size)
        if key not in self._hashes:
            while len(self._hashes) >= MAX_HASHES:
                self._hashes.pop(next(iter(self._hashes)), None)
            self._hashes[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._hashes[key]


def _parsed(data: bytes, what: str) -> Concept:
    from minikin.perfusion.concept_file import from_bytes  # needs PyTorch: not before there is a concept

    return from_bytes(data, what)


def notes_on_unused(names: Iterable[str]) -> list[str]:
    """A note for contents given by name (`concepts`) that no prompt names."""
    tags = [f"<{escaped(name[:40])}>" for name in sorted(names)[:MAX_CONCEPTS]]
    return [f"concepts has no effect here for {', '.join(tags)}: the prompt does not name it."] if tags else []


def _strip_hash(m: re.Match[str], hashes: dict[str, str]) -> str:
    """The tag without its hash, which is put into `hashes`."""
    name, sha256 = m["name"], m["hash"]
    if hashes.get(name, sha256).removeprefix("sha256:") != sha256:
        raise BadRecipe(
            f"The prompt names two contents of '{name}'. Give one of them another name when uploading."
        )
    hashes[name] = sha256
    return f"<{m['kind'] or ''}{name}"
