"""One open base: its concepts, its LoRAs, and the lock that all work on it takes turns with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Self

from minikin.errors import UnknownName
from minikin.generation.content_filter import Filtering, open_filtering
from minikin.generation.previews import LatentPreview
from minikin.models.base import Base
from minikin.models.loading.registry import open_base
from minikin.models.lora.adapters import Adapters
from minikin.models.prompt import UNKNOWN_HINT, concept_tags
from minikin.perfusion import library
from minikin.perfusion.attach import Concepts
from minikin.perfusion.concept import Concept
from minikin.recipes import FilterMode


class Session:
    """A base with the concepts in use on it."""

    def __init__(self, base: Base, filtering: Filtering | None = None) -> None:
        self.base = base
        self.filtering = filtering
        self.concepts = Concepts(base)
        self.adapters = Adapters(base)
        self.preview = LatentPreview()  # fitted by callers who display previews
        self._lock = threading.RLock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="minikin")

    @classmethod
    def open(cls, base: str = "tiny", *, filter: FilterMode | None = None, **how: Any) -> Self:
        """Open a base by name, folder, file or hub id; see `models.loading.registry.open_base`.

        filter  flag, blur or block images that the content filter objects to; see `generation.content_filter`
        """
        opened = open_base(base, **how)
        return cls(opened, open_filtering(filter, opened))

    def beside(self) -> Self:
        """The same base, LoRAs and lock with no concepts in use yet: a name space for somebody else."""
        other = copy(self)
        other.concepts = Concepts(self.base)
        return other

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock: inside, the base is the caller's alone."""
        with self._lock:
            yield

    def add(self, concept: Concept | str | Path, *, force: bool = False) -> Concept:
        """Use a concept in prompts: a Concept, a file, or a name from the library.

        force  also a gated one of another text encoder; see `perfusion.compatibility.check`
        """
        if isinstance(concept, str) and not concept.endswith(".safetensors"):
            concept = library.find(concept)
        with self._lock:  # encoding puts words into the shared text encoder
            return self.concepts.add(concept, force=force)

    def _need(self, prompt: str, *, force: bool = False) -> None:
        """Load the concepts a prompt names, from the library if they are not in use yet."""
        here = library.names()
        for name in concept_tags(prompt):
            if name in self.concepts.loaded:
                continue
            if name not in here:
                raise UnknownName("concept", name, {*self.concepts.loaded, *here}, UNKNOWN_HINT)
            self.add(name, force=force)
