"""Concept captions: training captions that name concepts, so that the student learns to follow them.

A student trained on plain captions never sees a concept's values, and its images of concepts have a lower
subject fidelity than the teacher's (docs/measurements.md). With `--concepts FOLDER` captions may name the
concepts of that folder as prompts do, `a photo of <tom> on the beach`; teacher and student use their values.
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
from minikin.models.text import tokenize
from minikin.perfusion.attach import Concepts
from minikin.perfusion.concept import Concept


def find(base: Base, folder: str | None, source: Source, *others: str) -> Concepts | None:
    """The concepts of a folder that a source's captions name; None without a folder.

    others  further texts that are encoded as captions, such as the negative prompt
    Raises BadRecipe for a folder without concepts, captions without names, and a caption with a syntax error
    or cut off before a name; UnknownName, BadConceptFile, BaseMismatch.
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
    """Parse and tokenize every caption that names a concept, so that errors come before the training."""
    for caption in captions:
        if concept_tags(caption):
            try:
                prompt = read(caption, concepts)
                for tokenizer in base.tokenizers:
                    tokenize(tokenizer, [prompt])
            except BadRecipe as e:
                raise BadRecipe(f"The caption '{caption[:80]}' cannot be used: {e}") from None


def read(caption: str, concepts: Concepts) -> Prompt:
    """A caption as a prompt. A caption without <name> has no syntax and is taken literally.

    Raises UnknownName, and BadRecipe for what captions cannot have: LoRAs, regions, operating points, edits.
    """
    if not concept_tags(caption):
        return Prompt(caption, caption)
    prompt = parse(caption, concepts.categories)
    if prompt.loras or prompt.edits or any(use.box or use.point for use in prompt.uses):
        raise BadRecipe(
            "it asks for a LoRA, a region, an operating point or another prompt in later steps. Captions name "
            "concepts as <name>, or with a strength, <name:0.8>."
        )
    return prompt


def digest(concepts: Concepts) -> str:
    """Hash of the concepts: names and contents."""
    facts = {name: concepts.digest(name) for name in sorted(concepts.loaded)}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
