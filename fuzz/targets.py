"""What is fuzzed: each target takes any bytes and lets nothing out but the documented error.

A target fails by raising: an error of another class, or an AssertionError when something was accepted
that breaks a rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch

from minikin import strict_json
from minikin.errors import BadConceptFile, BadRecipe, MinikinError
from minikin.generation import lineage
from minikin.generation.recorded_fields import recipe_fields
from minikin.images import metadata
from minikin.images.metadata import parse_parameters
from minikin.models.prompt import parse
from minikin.perfusion import concept_file as file
from minikin.perfusion import strict_safetensors as io
from minikin.perfusion.concept import Concept
from minikin.printable import escaped, escaped_json, is_obeyed


def concept_file(data: bytes) -> None:
    """A concept file: refused by BadConceptFile, or sound by every rule and by the safetensors library's."""
    try:
        concept = file.from_bytes(data)
    except BadConceptFile:
        return
    check_accepted(data, concept)


def check_accepted(data: bytes, concept: Concept) -> None:
    """AssertionError when a file should not have been accepted."""
    from safetensors.torch import load

    ours, meta = io.parse(data, "it")
    theirs = load(data)
    assert ours.keys() == theirs.keys(), "other tensors than the safetensors library reads"
    assert all(torch.equal(ours[k], theirs[k]) for k in ours), "other values than the safetensors library reads"
    json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_unique)
    assert concept.is_finite(), "numbers that are not finite"
    assert concept.n_values <= file.MAX_VALUES, "too many values"
    assert all(float(t.abs().max()) <= file.MAX_ABS for t in concept.delta.values()), "absurd values"
    assert len(meta) <= io.MAX_KEYS, "too many keys"
    assert all(len(v) <= io.MAX_VALUE or k in io.LONG for k, v in meta.items()), "too much metadata"
    text = "".join(_texts([concept.name, concept.category, *vars(concept.origin).values(), concept.recipe]))
    assert not any(c in text for c in "\x00\x1b\u202e\u200b"), "control characters"
    again = file.from_bytes(file.to_bytes(concept))
    assert (again.name, again.category, again.mode) == (concept.name, concept.category, concept.mode)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a key occurs twice"
    return dict(pairs)


def _texts(value: Any) -> Iterator[str]:
    """Every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(list(pair))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def prompt(data: bytes) -> None:
    """A prompt with concepts: parsed, or refused by BadRecipe."""
    try:
        parse(data.decode("utf-8", "replace"), {"tom": "cat", "rex": "dog"})
    except BadRecipe:
        return


def parameters(data: bytes) -> None:
    """A1111's text inside a stranger's image: always read as far as it can be."""
    parse_parameters(data.decode("utf-8", "replace"))


def strict_json_(data: bytes) -> None:
    """JSON of a stranger: refused by BadJson, or as Python reads it, within the limits, and writable again."""
    try:
        value = strict_json.loads(data)
    except strict_json.BadJson as e:
        str(e).encode()
        return
    assert value == json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique), (
        "another value than Python's"
    )
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    assert sum(1 for _ in _values(value)) <= strict_json.MAX_VALUES, "too many values"
    assert not any(map(is_obeyed, escaped_json(value))), "a terminal obeys it"


def _values(value: Any) -> Iterator[Any]:
    """Every value inside a JSON value, itself included."""
    yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _values(item)


def record(data: bytes) -> None:
    """A record of any tool in an image: read as far as it can be, repeated only if it is sound."""
    text = data.decode("utf-8", "replace")
    for key in ("minikin", "parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata", "Dream"):
        recorded = metadata.recorded_or_none({key: text})
        if recorded is None:
            continue
        escaped(f"{recorded.prompt}{recorded.negative}{recorded.settings}").encode()
        fields = recipe_fields(recorded, (64, 64))
        assert not {"base", "device", "backend"} & set(fields), "a form would take more than options"
        lineage.ancestors(recorded.recipe)
        lineage.concepts_of(recorded.recipe)
        with suppress(MinikinError):
            cost = lineage.cost(recorded.recipe, (64, 64))
            assert all(base.count("/") < 2 for base in cost.bases), "a path is followed"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "concept_file": concept_file, "prompt": prompt, "parameters": parameters, "strict_json": strict_json_,
    "record": record,
}  # fmt: skip
