"""Articles before concepts: `a photo of <tom>` is "a photo of a cat", `a big red <tom>` is "a big red cat".

An article that goes with the concept's name is made to go with its category: `an <oscar>` is "a cat".
"""

from __future__ import annotations

import re

_INDEFINITE = re.compile(r"(?:^|(?<=[\s(\[,]))([Aa])n?(?=\s+$)")
_LAST_WORD = re.compile(r"([^\W_][\w'’-]*)[ \t]+$")
_DETERMINER = re.compile(
    r"(?:^|[\s(\[,])(?:an?|the|my|your|his|her|its|our|their|this|that|these|those|one|two|three|four|five|six|"
    r"some|any|every|each|no|\w+'s)\s+$",
    re.IGNORECASE,
)

# Words after which a noun phrase begins. Any other word before a concept is taken for an adjective of it: there
# are too many adjectives to list, and "shiny a cat" is worse than "hugging cat".
_BEGIN_A_PHRASE = frozenset(
    """of in on at with and or nor but by to from next near under over behind beside besides between
    against around along across through into onto upon off toward towards before after during
    without within like as than vs versus for about beyond among amid per via atop underneath beneath
    is are was were be become becomes has have had having meets sees loves hugs holds rides wears eats kisses
    chases watches shows depicts features contains includes not just also while where when""".split()
)
# the same, but adjectives directly after a determiner: "a man walking a cat", "a walking cat"
_ADJECTIVES_TOO = frozenset(
    """above below inside outside plus then only showing depicting featuring containing including holding
    hugging riding carrying chasing eating watching petting feeding kissing facing following meeting greeting
    touching fighting pushing pulling leading walking painting drawing photographing surrounding
    being""".split()
) | {"wearing"}  # word: a word of prompts


# by their sound: a unicorn, a European, an hourglass, an X-ray
_CONSONANT = re.compile(r"uni(?![mnd])|us[aeu]|ut[eio]|uku|ufo|ura|eu|ewe|one\b", re.IGNORECASE)
_VOWEL = re.compile(r"hour|honou?r|honest|heir|x-?ray|[aeiou]", re.IGNORECASE)


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if _VOWEL.match(word) and not _CONSONANT.match(word) else "a"


def needs_article(before: str) -> bool:
    """True if a noun after this text needs an article.

    It does at the beginning, after punctuation, and after a word that begins a noun phrase; not after a
    determiner or an adjective, however many there are, or a hyphen.
    """
    word = _LAST_WORD.search(before)
    if word is None:
        return not before.endswith("-")
    if word[1].lower() in _ADJECTIVES_TOO:
        return not _DETERMINER.search(before[: word.start()])
    return word[1].lower() in _BEGIN_A_PHRASE


def agreeing(before: str, word: str) -> str:
    """The text before a word; an indefinite article at its end takes the form that the word needs."""
    return _INDEFINITE.sub(lambda m: m[1] + article(word)[1:], before)
