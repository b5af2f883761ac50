"""The methods that are compared: what each is asked for, what it made, and how large that is.

Perfusion's concepts are read back from their files, which are in half precision, as anybody would use
them; baselines from theirs, in float32. Teaching is kept by everything it depends on, so that the same
comparison teaches nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minikin.baselines import methods as baselines
from minikin.baselines import sizes
from minikin.baselines.result import Learned
from minikin.baselines.train import check as check_baseline
from minikin.errors import BadRecipe, UnknownName
from minikin.evaluation.compare.variants import ABLATIONS, check, variant
from minikin.evaluation.sweep.cache import key
from minikin.events import Done, Event
from minikin.files import atomic_write
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.memory import peak
from minikin.perfusion import concept_file
from minikin.perfusion.concept import Concept
from minikin.recipes import BESIDE, Baseline, Compare, Teach

PERFUSION = {"perfusion-row": "row", "perfusion-gated": "gated"}  # name -> mode, the default first
SPARE = ("zwx", "bacus", "embic")  # rare words for a second thing; the last two are of tiny
ONE_POINT = "textual-inversion"  # a word is there or not: it has no strength
CARD = "taught.json"
_FAMILIES = {"sd15": "sd1", "sdxl": "sdxl"}  # name in `architectures` -> a base's architecture

Teaching = Callable[[Teach | Baseline, Path, Sequence[Photo]], Iterator[Event]]  # ends with Done(what it made)


@dataclass(frozen=True)
class Taught:
    """One method's result.

    digest   stands for what was learned
    sizes    bytes on this base ("own"), and computed for SD 1.5 ("sd15") and SDXL ("sdxl")
    seconds  of teaching, without what is computed once and kept: C, images of the category
    memory   bytes at the most, the base included; None where it is not known
    """

    method: str
    result: Any
    digest: str
    sizes: Mapping[str, int]
    seconds: float
    memory: int | None
    steps: int


def names() -> tuple[str, ...]:
    """All methods, Minikin's own first."""
    return (*PERFUSION, *baselines.METHODS)


def chosen(asked: str) -> tuple[str, ...]:
    """The methods or variants named in a list with commas, "all" methods, or the "ablations".

    Raises UnknownName, BadRecipe.
    """
    groups = {"all": names(), "ablations": ABLATIONS}
    listed = [groups.get(part.strip(), (part.strip(),)) for part in asked.split(",")]
    found = tuple(dict.fromkeys(name for part in listed for name in part))
    for name in found:
        method = variant(name).method
        if method not in names():
            raise UnknownName("method", method, (*groups, *names()))
        check(name, (Teach if method in PERFUSION else Baseline).model_fields)
    return found


def strengths(method: str, recipe: Compare) -> tuple[float, ...]:
    """The strengths a method is painted with, 1 (as taught) first."""
    return (1.0,) if variant(method).method == ONE_POINT else tuple(dict.fromkeys((1.0, *recipe.strengths)))


def asked(method: str, recipe: Compare, tiny: bool) -> Teach | Baseline:
    """What the method is asked for: its own defaults, with its variant's changes. Raises BadRecipe."""
    which = variant(method)
    own: dict[str, Any] = {
        "name": recipe.name, "category": recipe.category, "base": recipe.base, "seed": recipe.seed,
        "steps": recipe.teach_steps, "device": recipe.device, "dtype": recipe.dtype,
    }  # fmt: skip
    made: Teach | Baseline
    if which.method in PERFUSION:
        own |= {"mode": PERFUSION[which.method], "sample_every": 0, "preview": False}
        made = Teach.make(**own | dict(which.recipe))
    else:
        made = Baseline.make(**own | {"method": which.method} | dict(which.recipe)).settled(tiny)
    return made


def teach(
    base: Base, photos: Sequence[Photo], recipe: Compare, method: str, out: Path, teaching: Teaching
) -> Generator[Event, None, Taught]:  # fmt: skip
    """Teach by a method into a folder below `out`, or read what was taught there before.

    Raises what teaching does.
    """
    wanted, which = asked(method, recipe, base.architecture == "tiny"), variant(method)
    if recipe.name == BESIDE and isinstance(wanted, Baseline):
        wanted = wanted.model_copy(update={"word": _spare(base, photos, wanted)})
    photos = photos[: which.photos]
    if which.recipe.get("mask") == "none":  # an ablation: without the photos' own masks, too
        photos = [replace(p, mask=None) for p in photos]
    seen = hashlib.sha256(b"".join(p.pixels.tobytes() for p in photos)).hexdigest()
    settings = wanted.model_dump(mode="json", exclude={"base", "device", "dtype"})
    folder = (
        out / f"{which.method}-{key(base.fingerprint, base.text_hash, str(base.dtype), settings, seen)[:8]}"
    )
    if not (folder / CARD).is_file():
        if (folder / baselines.CARD).is_file():
            shutil.rmtree(folder)  # taught, but killed before its costs were written
        done: Done | None = None
        with peak(base.device) as most:
            for event in teaching(wanted, folder, photos):
                if isinstance(event, Done):
                    done = event
                else:
                    yield event
        assert done is not None
        if isinstance(done.result, Concept):
            assert isinstance(wanted, Teach)
            concept_file.save(done.result, folder / f"{recipe.name}.safetensors", int8=wanted.int8)
        facts = {
            "seconds": done.facts["seconds"] + done.facts.get("preparing", 0.0), "memory": most.bytes,
            "steps": done.facts["steps"], "digest": _digest(folder),
        }  # fmt: skip
        atomic_write(folder / CARD, json.dumps(facts, indent=1).encode())
    facts = json.loads((folder / CARD).read_text())
    result: Concept | Learned
    if isinstance(wanted, Teach):
        path = folder / f"{recipe.name}.safetensors"
        result = concept_file.load(path)
        table = {"own": path.stat().st_size, **{f: concept_bytes(result, f, wanted.int8) for f in sizes.REAL}}
    else:
        result = baselines.load(base, folder)
        table = baselines.size_table(which.method, base, wanted.rank)
    return Taught(method, result, facts["digest"], table, facts["seconds"], facts["memory"], facts["steps"])


def _spare(base: Base, photos: Sequence[Photo], wanted: Baseline) -> str:
    """Another rare word than the one this method takes first. Raises BadRecipe."""
    first = check_baseline(base, photos, wanted)
    for word in SPARE:
        if word != first and all(
            len(t(word, add_special_tokens=False).input_ids) == 1 for t in base.tokenizers
        ):
            return word
    raise BadRecipe(
        f"None of {', '.join(SPARE)} is one token of '{base.name}': two things cannot be taught on it."
    )


def concept_bytes(concept: Concept, family: str, int8: bool | None = None) -> int:
    """Bytes of the file such a concept has on the real SD 1.5 or SDXL, header included.

    family  a name of `sizes.REAL`; the category is taken to be one token
    int8    value differences in 8 bits; by the family when it is not said
    """
    shapes = sizes.of_family(family)
    values = {n: s for n, s in shapes.unet.items() if n.endswith(".attn2.to_v.weight")}
    gated = concept.mode == "gated"
    width = sum(shapes.texts) if gated else 1
    sites = {n.removesuffix(".to_v.weight"): torch.zeros(s[0]) for n, s in values.items()}
    like = replace(
        concept, points={}, preview=b"", origin=replace(concept.origin, architecture=_FAMILIES[family]),
        word_deltas=tuple(torch.zeros(1, w) for w in shapes.texts) if gated else (),
        i_star=torch.ones(width), dual=torch.ones(width),
        delta=sites, keys=sites if concept.keys else {},
    )  # fmt: skip
    return len(concept_file.to_bytes(like, int8=int8))


def _digest(folder: Path) -> str:
    """Of everything that was learned, 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with open(path, "rb") as f:
            sha.update(hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()[:16]
