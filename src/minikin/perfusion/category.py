"""The category's words: whether the base has words for them."""

from __future__ import annotations

import re

from minikin.models.base import Base

SMALL = (
    10_000  # entries of a vocabulary that was made of the base's own captions: what they hold is whole there
)
PIECES, LETTERS = 3, 2.0  # a word of so many scraps or more, each of so few letters or fewer in the mean


def caution(base: Base, category: str) -> str:
    """What to say of words that the base probably does not know; "" when it seems to know them all.

    CLIP's 49,408 entries are of the web's captions. Everyday words are one each, rarer ones two or three long
    pieces ("labra", "doodle"). Of 183 things, from cats to marimbas, this rule doubts one (axolotl), and 74 %
    of words of 4 to 8 random letters. Tiny's 3,584 hold every word of its own captions: it doubts all others.
    """
    doubted = [word for word in re.findall(r"[^\W_]+", category) if _is_scraps(base, word)]
    if not doubted:
        return ""
    told = " and ".join(f"'{word}' ({base.count_tokens(word)} pieces)" for word in doubted)
    return (
        f"The base reads the category in scraps, so it probably does not know it: {told}. The concept begins "
        "from what the base knows of its category; name it in one to three everyday words, such as 'cat' or "
        "'teddy bear'."
    )


def _is_scraps(base: Base, word: str) -> bool:
    n = base.count_tokens(word)
    if len(base.tokenizers[0]) < SMALL:
        return n > 1
    return n >= PIECES and len(word) / n <= LETTERS
