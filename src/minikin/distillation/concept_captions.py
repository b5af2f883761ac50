"""Concepts that captions name: a student that has met some follows others better.

A student of plain captions never sees a concept's values, and paints concepts that its teacher paints well
with less likeness (docs/measurements.md). With `--concepts FOLDER` captions may name the concepts of that
folder as prompts do, `a photo of <tom> on the beach`; teacher and student are given their values alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from minikin.distillation.sources import Source
from minikin.errors import BadRecipe, UnknownName
from minikin.models.base import Base
from minikin.models.prompt import Prompt, concept_tags, parse
from minikin.models.text import tokenized
from minikin.perfusion.attach import Concepts
from minikin.perfusion.concept import Concept


def find(base: Base, folder: str | None, source: Source, *others: str) -> Concepts | None:
    """The concepts of a folder that the captions of a source name; None without a folder.

    others  what else is encoded as a caption
    Raises BadRecipe for a folder without concepts, captions without names, or one that cannot be read or is
    cut off before a name; UnknownName, BadConceptFile, BaseMismatch.
    """
    if folder is None:
        return None
    files = {p.stem: p for p in sorted(Path(folder).expanduser().glob("*.safetensors"))}
    if not files:
        raise BadRecipe(f"--concepts {folder} is no folder of concept files (NAME.safetensors).")
    names = dict.fromkeys(n for i in range(len(source)) for c in source.captions(i) for n in concept_tags(c))
    if not names:
        raise BadRecipe(
            f"No caption names a concept. Write them as in prompts: a photo of <{next(iter(files))}>."
        )
    concepts = Concepts(base)
    for name in names:
        if name not in files:
            raise UnknownName(
                "concept", name, files, f"Captions name it; --concepts {folder} has no such file."
            )
        concepts.add(Concept.load(files[name]).renamed(name))
    _check(base, concepts, [*(c for i in range(len(source)) for c in source.captions(i)), *others])
    return concepts


def _check(base: Base, concepts: Concepts, captions: Iterable[str]) -> None:
    """Every caption that names something, before anything is painted for it."""
    for caption in captions:
        if concept_tags(caption):
            try:
                prompt = read(caption, concepts)
                for tokenizer in base.tokenizers:
                    tokenized(tokenizer, [prompt])
            except BadRecipe as e:
                raise BadRecipe(f"The caption '{caption[:80]}' cannot be used: {e}") from None


def read(caption: str, concepts: Concepts) -> Prompt:
    """A caption as a prompt; one that names nothing as it is, without any syntax.

    Raises UnknownName, and BadRecipe for what a student is not given: LoRAs, regions, operating points.
    """
    if not concept_tags(caption):
        return Prompt(caption, caption)
    prompt = parse(caption, concepts.categories)
    if prompt.loras or any(use.box or use.point for use in prompt.uses):
        raise BadRecipe(
            "it asks for a LoRA, a region or an operating point. Captions name concepts as <name>, or with a "
            "strength, <name:0.8>."
        )
    return prompt


def digest(concepts: Concepts) -> str:
    """Equal for equal concepts."""
    facts = {name: concepts.digest(name) for name in sorted(concepts.loaded)}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
