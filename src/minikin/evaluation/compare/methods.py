"""Methods of a comparison: their recipes, their trained results, and the sizes of those.

Perfusion's concepts are read back from their files, which are in half precision, as anybody would use them;
baselines from theirs, in float32. Results are stored under a hash of everything they depend on, so that the
same comparison trains nothing twice.
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
from minikin.baselines.result import BaselineResult
from minikin.baselines.train import check as check_baseline
from minikin.errors import BadRecipe, UnknownName
from minikin.evaluation.cache import key
from minikin.evaluation.compare.variants import ABLATIONS, check, current_name, variant
from minikin.events import Done, Event
from minikin.files import atomic_write
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.models.memory import peak
from minikin.perfusion import concept_file
from minikin.perfusion.concept import Concept
from minikin.recipes import SECOND_NAME, Baseline, Compare, Teach

PERFUSION = {"perfusion-value": "value", "perfusion-gated": "gated"}  # name -> mode, the default first
RARE_WORDS = ("zwx", "bacus", "embic")  # for a second subject; the last two are in tiny's vocabulary
WITHOUT_STRENGTH = "textual-inversion"
COSTS = "taught.json"
_ARCHITECTURES = {"sd15": "sd1", "sdxl": "sdxl"}  # of `sizes.REAL` -> of a base

# trains by a recipe into a folder; the last event is Done with the result
Trainer = Callable[[Teach | Baseline, Path, Sequence[Photo]], Iterator[Event]]


@dataclass(frozen=True)
class TrainedMethod:
    """Trained result of a method, with its costs.

    digest   hash of the trained weights
    sizes    bytes on this base ("own"), and computed for SD 1.5 ("sd15") and SDXL ("sdxl")
    seconds  of training, without what is computed once and cached: C, images of the category
    memory   peak in bytes, the base included; None where it is not known
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


def parse_methods(text: str) -> tuple[str, ...]:
    """Methods or variants of a list with commas; "all" stands for all methods, "ablations" for ABLATIONS.

    Raises UnknownName, BadRecipe.
    """
    groups = {"all": names(), "ablations": ABLATIONS}
    parts = [groups.get(part.strip(), (current_name(part.strip()),)) for part in text.split(",")]
    methods = tuple(dict.fromkeys(name for part in parts for name in part))
    for name in methods:
        method = variant(name).method
        if method not in names():
            raise UnknownName("method", method, (*groups, *names()))
        check(name, (Teach if method in PERFUSION else Baseline).option_names())
    return methods


def strengths(method: str, recipe: Compare) -> tuple[float, ...]:
    """Strengths at which a method is evaluated, 1 (as trained) first."""
    has_strength = variant(method).method != WITHOUT_STRENGTH
    return tuple(dict.fromkeys((1.0, *recipe.strengths))) if has_strength else (1.0,)


def training_recipe(method: str, recipe: Compare, tiny: bool) -> Teach | Baseline:
    """The method's own defaults with its variant's changes. Raises BadRecipe."""
    changed = variant(method)
    values: dict[str, Any] = {
        "name": recipe.name, "category": recipe.category, "base": recipe.base, "seed": recipe.seed,
        "steps": recipe.teach_steps, "device": recipe.device, "dtype": recipe.dtype,
    }  # fmt: skip
    training: Teach | Baseline
    if changed.method in PERFUSION:
        values |= {"mode": PERFUSION[changed.method], "sample_every": 0, "preview": False}
        training = Teach.make(**values | dict(changed.recipe))
    else:
        training = Baseline.make(**values | {"method": changed.method} | dict(changed.recipe)).resolved(tiny)
    return training


def train(
    base: Base, photos: Sequence[Photo], recipe: Compare, method: str, out: Path, trainer: Trainer
) -> Generator[Event, None, TrainedMethod]:
    """Train a method into a folder below `out`, or read the result of an earlier run.

    Raises what training does.
    """
    tiny, changed = base.architecture == "tiny", variant(method)
    training = training_recipe(method, recipe, tiny)
    if recipe.name == SECOND_NAME and isinstance(training, Baseline):
        training = training.model_copy(update={"word": _second_word(base, photos, training)})
    photos = photos[: changed.photos]
    if changed.recipe.get("mask") == "none":  # an ablation: without the photos' own masks, too
        photos = [replace(p, mask=None) for p in photos]
    pixels = hashlib.sha256(b"".join(p.pixels.tobytes() for p in photos)).hexdigest()
    options = training.model_dump(mode="json", exclude={"base", "device", "dtype"})
    digest = key(base.fingerprint, base.text_hash, str(base.dtype), options, pixels)
    folder = out / f"{changed.method}-{digest[:8]}"
    if not (folder / COSTS).is_file():
        yield from _train(base, training, folder, photos, trainer)
    costs = json.loads((folder / COSTS).read_text())
    result: Concept | BaselineResult
    if isinstance(training, Teach):
        path = folder / f"{recipe.name}.safetensors"
        result = concept_file.load(path)
        n_bytes = {"own": path.stat().st_size}
        n_bytes |= {family: concept_bytes(result, family, training.int8) for family in sizes.REAL}
    else:
        result = baselines.load(base, folder)
        n_bytes = baselines.size_table(changed.method, base, training.rank)
    return TrainedMethod(
        method, result, costs["digest"], n_bytes, costs["seconds"], costs["memory"], costs["steps"]
    )


def _train(
    base: Base, training: Teach | Baseline, folder: Path, photos: Sequence[Photo], trainer: Trainer
) -> Iterator[Event]:
    """Train, save, and note the costs last: a folder without them is incomplete."""
    if (folder / baselines.CARD).is_file():
        shutil.rmtree(folder)  # trained, but killed before its costs were written
    done: Done | None = None
    with peak(base.device) as memory:
        for event in trainer(training, folder, photos):
            if isinstance(event, Done):
                done = event
            else:
                yield event
    assert done is not None
    if isinstance(done.result, Concept):
        assert isinstance(training, Teach)
        concept_file.save(done.result, folder / f"{training.name}.safetensors", int8=training.int8)
    costs = {
        "seconds": done.facts["seconds"] + done.facts.get("preparing", 0.0), "memory": memory.bytes,
        "steps": done.facts["steps"], "digest": _digest(folder),
    }  # fmt: skip
    atomic_write(folder / COSTS, json.dumps(costs, indent=1).encode())


def _second_word(base: Base, photos: Sequence[Photo], training: Baseline) -> str:
    """A rare word for the second subject, other than the first one's. Raises BadRecipe."""
    first = check_baseline(base, photos, training)
    for word in RARE_WORDS:
        if word != first and all(
            len(t(word, add_special_tokens=False).input_ids) == 1 for t in base.tokenizers
        ):
            return word
    raise BadRecipe(
        f"None of {', '.join(RARE_WORDS)} is one token of '{base.name}': it cannot be trained on two subjects."
    )


def concept_bytes(concept: Concept, family: str, int8: bool | None = None) -> int:
    """Bytes of the file such a concept has on the real SD 1.5 or SDXL, header included.

    family  a name of `sizes.REAL`; the category is taken to be one token
    int8    value differences in 8 bits; the family's default for None
    """
    shapes = sizes.of_family(family)
    values = {n: s for n, s in shapes.unet.items() if n.endswith(".attn2.to_v.weight")}
    gated = concept.mode == "gated"
    width = sum(shapes.texts) if gated else 1
    layers = {n.removesuffix(".to_v.weight"): torch.zeros(s[0]) for n, s in values.items()}
    same_kind = replace(
        concept,
        points={},
        preview=b"",
        origin=replace(concept.origin, architecture=_ARCHITECTURES[family]),
        word_deltas=tuple(torch.zeros(1, w) for w in shapes.texts) if gated else (),
        i_star=torch.ones(width),
        dual=torch.ones(width),
        delta=layers,
        keys=layers if concept.keys else {},
    )
    return len(concept_file.to_bytes(same_kind, int8=int8))


def _digest(folder: Path) -> str:
    """16 hexadecimal digits over all trained weights."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with open(path, "rb") as f:
            sha.update(hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()[:16]
