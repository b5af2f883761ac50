"""Tags in angle brackets: concepts, LoRAs as in A1111, and what other tools write there."""

from __future__ import annotations

import re
from functools import partial
from typing import NamedTuple

from minikin.errors import BadRecipe
from minikin.limits import POINT_NAMES

LORA_KINDS = ("lora", "lyco")  # LyCORIS' own extension of A1111 called them so
FOREIGN = {
    "hypernet": "hypernetworks are not read here",
    **dict.fromkeys(
        ("embed", "embedding", "ti"), "import the embedding (`minikin concepts import`) and write <name>"
    ),
    **dict.fromkeys(
        ("random", "wildcard", "wc", "alternate", "alt", "fromto", "weight", "segment", "region", "object",
         "clear", "preset", "var", "setvar", "macro", "setmacro", "param", "trigger", "comment", "repeat",
         "stage", "base", "refiner", "video", "videoswap", "extend"),
        "it is SwarmUI's syntax, which is not followed",
    ),
}  # fmt: skip
_CONCEPT_EXAMPLE = f"<tom:0.8>, or the name of an operating point: {', '.join(POINT_NAMES)}"
_LORA_EXAMPLE = "<lora:style:0.8>"
_NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*")


class Tag(NamedTuple):
    """A tag's parts.

    kind       concept, lora, or one of FOREIGN
    name       of the concept or the LoRA; region and hash of a concept included
    arguments  the parts after it
    """

    kind: str
    name: str
    arguments: tuple[str, ...]


class LoraUse(NamedTuple):
    """A LoRA in a prompt: its weights on U-Net and text encoders, and arguments that are not followed."""

    name: str
    weight: float
    text_weight: float
    unread: tuple[str, ...] = ()


def read_tag(text: str) -> Tag:
    """Split a tag, given without its angle brackets."""
    head, *rest = (part.strip() for part in text.split(":"))
    kind = head.lower().partition("[")[0]
    if rest and (kind == "concept" or kind in LORA_KINDS):
        return Tag("concept" if kind == "concept" else "lora", rest[0], tuple(rest[1:]))
    if rest and kind in FOREIGN and not _is_strength(rest):
        return Tag(kind, ":".join(rest), ())
    return Tag("concept", head, tuple(rest))


def _is_strength(arguments: list[str]) -> bool:
    return len(arguments) == 1 and bool(_NUMBER.fullmatch(arguments[0]) or arguments[0] in POINT_NAMES)


def read_lora(tag: Tag, text: str) -> LoraUse:
    """A LoRA's weights as A1111 reads them: <lora:name:text:unet>, <lora:name:both>, te= and unet= by name.

    Raises BadRecipe for a weight that is no number, and for a tag without a name.
    """
    if not tag.name:
        raise BadRecipe(f"<{text}> names no LoRA; write for example {_LORA_EXAMPLE}.")
    positional = [a for a in tag.arguments if "=" not in a]
    by_name = {k.strip(): v for k, _, v in (a.partition("=") for a in tag.arguments if "=" in a)}
    unread = [a for a in positional[1:] if a and not _NUMBER.fullmatch(a)]
    weights = [a for a in positional if a and a not in unread]
    unread += [*weights[2:], *(f"{k}={v}" for k, v in by_name.items() if k not in ("te", "unet"))]
    read = partial(number, tag=text, example=_LORA_EXAMPLE)
    text_weight = read(weights[0]) if weights else 1.0
    text_weight = read(by_name["te"]) if "te" in by_name else text_weight
    weight = read(weights[1]) if len(weights) > 1 else text_weight
    weight = read(by_name["unet"]) if "unet" in by_name else weight
    return LoraUse(tag.name, weight, text_weight, tuple(unread))


def number(value: str, tag: str, example: str = _CONCEPT_EXAMPLE) -> float:
    """A number in a tag; raises BadRecipe, which shows how to write it."""
    try:
        return float(value)
    except ValueError:
        raise BadRecipe(f"'{value}' in <{tag}> is not a number; write for example {example}.") from None
