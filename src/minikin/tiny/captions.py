"""Captions of varied wording and length, every word of them true of the scene.

The subject's noun is known by its place: `Caption.nouns` gives the character span of every
object's noun, which text training needs to say the same thing of another object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from minikin.tiny import vocabulary as words
from minikin.tiny.scene import Look, Rng, Scene, Thing, pick

# layout: words between its two things; in "front" and "on" the second one is named first
_BETWEEN = {
    "hat": "wearing",  # word: caption
    "on": "on",
    "front": "in front of",
    "hold": "holding",
    "in": "in",
}
_NOUN = re.compile(r"\{([^|}]*)\|([^}]*)\}")


@dataclass(frozen=True)
class Caption:
    """text, and for every object's noun (category, start, end) in characters."""

    text: str
    nouns: tuple[tuple[str, int, int], ...]


def caption(scene: Scene, rng: Rng) -> Caption:
    """One true caption; the generator chooses the wording."""
    return _unmark(_finish(scene, rng, _subject(scene, rng)))


def plain_caption(scene: Scene) -> str:
    """The shortest caption that names the things and the background, for evaluation."""
    text = " and ".join(_article(t.category) for t in scene.things) or "nothing"
    if scene.layout == "count":
        text = f"{'two' if scene.count == 2 else 'three'} {words.CATEGORIES[scene.objects[0]].plural}"
    elif scene.layout in _BETWEEN:
        things = reversed(scene.things) if scene.layout in ("on", "front") else scene.things
        text = f" {_BETWEEN[scene.layout]} ".join(_article(t.category) for t in things)
    where = (
        f"on {_article(scene.background[6:])} background"
        if scene.is_plain
        else words.BACKGROUNDS[scene.background][0]
    )
    return f"{text} {where}"


def _unmark(marked: str) -> Caption:
    out, nouns, last = "", [], 0
    for m in _NOUN.finditer(marked):
        out += marked[last : m.start()]
        nouns.append((m.group(1), len(out), len(out) + len(m.group(2))))
        out += m.group(2)
        last = m.end()
    return Caption(out + marked[last:], tuple(nouns))


def _article(phrase: str) -> str:
    bare = _NOUN.sub(lambda m: m.group(2), phrase)
    vowel = bare[0] in "aeiou" and not bare.startswith("uni")
    return ("an " if vowel else "a ") + phrase


def _noun(rng: Rng, category: str, plural: bool = False) -> str:
    c = words.CATEGORIES[category]
    if plural:
        word = c.plural
    else:
        word = pick(rng, c.synonyms) if c.synonyms and rng.random() < 0.15 else c.name
    return f"{{{category}|{word}}}"


def _look_words(rng: Rng, look: Look) -> str:
    if look.colour:
        return "dark" if look.colour == "black" and rng.random() < 0.2 else look.colour
    if look.pattern:
        adjective = pick(rng, words.PATTERNS[look.pattern])
        return (
            f"{look.colour_names[0]} and {look.colour_names[1]} {adjective}" if look.colour_names else adjective
        )
    return ""


def _phrase(rng: Rng, thing: Thing, size: str | None = None) -> str:
    parts = []
    if size and rng.random() < 0.95:
        parts.append(pick(rng, words.SIZES[size]))
    parts += [_look_words(rng, thing.look), _noun(rng, thing.category)]
    return _article(" ".join(p for p in parts if p))


def _subject(scene: Scene, rng: Rng) -> str | None:
    things = scene.things
    if scene.layout == "single":
        return _phrase(rng, things[0], scene.size)
    if scene.layout == "pair":
        a, b = (_phrase(rng, t) for t in things)
        # named from left to right unless the words say otherwise: where each stands is never a guess
        return pick(rng, (
            f"{a} and {b}", f"{a} and {b}", f"{a} next to {b}", f"{a} beside {b}",
            f"{a} to the left of {b}", f"{b} to the right of {a}",
            f"{a} on the left and {b} on the right", f"{a} with {b}",
        ))  # fmt: skip
    if scene.layout == "hat":
        a, b = (_phrase(rng, t) for t in things)
        phrases = (f"{a} wearing {b}", f"{a} wearing {b}", f"{a} with {b} on its head")  # word: caption
        return pick(rng, phrases)
    if scene.layout == "trio":
        a, b, c = (_phrase(rng, t) for t in things)
        return pick(
            rng, (f"{a}, {b} and {c}", f"{a}, {b}, and {c}", f"{a} and {b} and {c}", f"{a} with {b} and {c}")
        )
    if scene.layout == "front":
        back, front = (_phrase(rng, t) for t in things)
        phrases = (f"{front} in front of {back}", f"{front} in front of {back}", f"{back} behind {front}")
        return pick(rng, phrases)
    if scene.layout == "in":
        inner, outer = (_phrase(rng, t) for t in things)
        return f"{inner} {pick(rng, ('in', 'in', 'inside', 'sitting in'))} {outer}"
    if scene.layout in ("top", "on"):
        below, above = (_phrase(rng, t) for t in things)
        if scene.layout == "on" and rng.random() < 0.4:
            return f"{below} {pick(rng, ('under', 'under', 'below'))} {above}"
        how = pick(rng, ("on top of", "sitting on", "on", "standing on"))
        return f"{above} {how} {below}"
    if scene.layout == "hold":
        a, b = (_phrase(rng, t) for t in things)
        return f"{a} {pick(rng, ('holding', 'holding', 'carrying'))} {b}"
    if scene.layout == "count":
        parts = (
            "two" if scene.count == 2 else "three",
            _look_words(rng, things[0].look),
            _noun(rng, things[0].category, plural=True),
        )
        return " ".join(p for p in parts if p)
    return None


def _finish(scene: Scene, rng: Rng, text: str | None) -> str:
    colour = scene.background[6:] if scene.is_plain else None
    if text is None:
        if colour:
            text = f"{_article(colour)} background"
        else:
            where = pick(rng, words.BACKGROUNDS[scene.background])
            text = f"{pick(rng, ('nothing', 'an empty scene'))} {where}"
    elif rng.random() < 0.90:
        if colour:
            text += " " + pick(rng, (
                f"on {_article(colour)} background", f"on a plain {colour} background",
                f"against {_article(colour)} background", f"with {_article(colour)} background",
            ))  # fmt: skip
        else:
            where = pick(rng, words.BACKGROUNDS[scene.background])
            if rng.random() < 0.05 and not scene.treatment:
                return f"{where}, {text}"
            text = f"{text} {where}"
    return _style(scene, rng, text)


def _style(scene: Scene, rng: Rng, text: str) -> str:
    if scene.treatment:
        w = pick(rng, words.TREATMENTS[scene.treatment])
        return pick(rng, (
            f"{w} of {text}", f"{_article(w)} picture of {text}", f"{text}, {w}",  # word: caption
            f"{text} in {w} style",
        ))  # fmt: skip
    roll = rng.random()
    if scene.sticker and roll < 0.7:
        return pick(rng, (
            f"a sticker of {text}", f"a cute sticker of {text}", f"{text}, sticker",
            f"{text}, sticker with a white border",
        ))  # fmt: skip
    if roll < 0.30:
        w = pick(rng, words.ART_SETS[scene.art].words)
        return pick(rng, (
            f"{_article(w)} of {text}", f"{_article(w)} of {text}", f"{text}, {w}", f"{text} in {w} style",
        ))  # fmt: skip
    if roll < 0.66:
        return f"{pick(rng, words.GENERIC)} {text}"
    return text
