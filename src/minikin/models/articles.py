"""Articles before concepts: `a photo of <tom>` is "a photo of a cat", `a big red <tom>` is "a big red cat"."""

from __future__ import annotations

import re

# a determiner, number or possessive and at most two more words; no article is inserted after them
_DETERMINED = re.compile(
    r"(?:^|[\s(\[,])(?:an?|the|my|your|his|her|its|our|their|this|that|these|those|one|two|three|four|"
    r"five|six|some|any|every|each|no|\w+'s)(?:\s+(?!(?:of|in|on|at|with|and|or|by|to|from|next|near|under)\b)"
    r"[\w-]+){0,2}\s+$",
    re.IGNORECASE,
)
_LAST_WORD = re.compile(r"([^\W_][\w'’-]*)[ \t]+$")

# Words after which a noun phrase begins. Any other word before a concept is taken for an adjective of it: there
# are too many adjectives to list, and "shiny a cat" is worse than "hugging cat".
_BEGIN_A_PHRASE = frozenset(
    """of in on at with and or nor but by to from next near under over above below behind beside besides between
    against around along across through inside outside into onto upon off toward towards before after during
    without within like as than vs versus plus for about beyond among amid per via atop underneath beneath
    is are was were be become becomes has have had having meets sees loves hugs holds rides wears eats kisses
    chases watches shows depicts features contains includes not only just also then while where when
    showing depicting featuring containing including holding hugging riding carrying chasing eating
    watching petting feeding kissing facing following meeting greeting touching fighting pushing pulling leading
    walking painting drawing photographing surrounding being""".split()
) | {"wearing"}  # word: a word of prompts


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[0].lower() in "aeiou" else "a"


def needs_article(before: str) -> bool:
    """True if a noun after this text needs an article.

    It does at the beginning, after punctuation, and after a word that begins a noun phrase; not after a
    determiner, or after an adjective, however many there are.
    """
    if _DETERMINED.search(before):
        return False
    word = _LAST_WORD.search(before)
    return word is None or word[1].lower() in _BEGIN_A_PHRASE
