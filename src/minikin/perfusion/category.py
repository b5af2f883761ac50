"""A check of words against the base's vocabulary."""

from __future__ import annotations

import re

from minikin.models.base import Base

SMALL_VOCABULARY = 10_000  # entries; a smaller one was built from the base's captions and has their words whole
MAX_WORDS = 200  # of a text that are looked up
MIN_TOKENS, MAX_LETTERS = 3, 2.0  # a word of at least so many tokens, of at most so many letters on average


def unknown_words(base: Base, text: str) -> list[str]:
    """Words of a text that the base probably does not know, each once.

    In CLIP's vocabulary of 49,408 entries everyday words are one token, rarer ones two or three long tokens
    ("labra", "doodle"). Of 183 things, from cats to marimbas, the rule doubts one (axolotl), and of words of 4
    to 8 random letters 74 %. The 3,584 entries of tiny contain every word of its captions, so it doubts any
    word of several tokens. Words with digits are left alone ("3d", "8k").
    """
    words = list(dict.fromkeys(re.findall(r"[^\W_]+", text)))[:MAX_WORDS]
    return [w for w in words if not any(c.isdigit() for c in w) and _is_split(base, w)]


def unknown_word_warning(base: Base, category: str) -> str:
    """Warning for category words that the base probably does not know; "" if it seems to know them all."""
    doubted = unknown_words(base, category)
    if not doubted:
        return ""
    words = " and ".join(f"'{word}' ({base.count_tokens(word)} tokens)" for word in doubted)
    return (
        f"The base splits the category into sub-word tokens, so it probably does not know it: {words}. A "
        "concept starts from the base's knowledge of its category. Use one to three everyday words, such as "
        "'cat' or 'teddy bear'."
    )


def _is_split(base: Base, word: str) -> bool:
    n = base.count_tokens(word)
    if len(base.tokenizers[0]) < SMALL_VOCABULARY:
        return n > 1
    return n >= MIN_TOKENS and len(word) / n <= MAX_LETTERS
