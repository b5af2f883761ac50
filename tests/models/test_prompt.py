"""Prompt syntax: A1111's attention grammar, escapes, concept tags."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikin.errors import BadRecipe, UnknownName
from minikin.models.prompt import MAX_PROMPT, ConceptUse, concept_tags, parse

CATEGORIES = {"tom": "cat", "rex": "teddy bear"}


def weighted_runs(source: str) -> list[tuple[str, float]]:
    """The prompt as A1111 would list it: runs of text with their attention weight."""
    p = parse(source, CATEGORIES)
    weights = [1.0] * len(p.text)
    for w in p.weights:
        for i in range(w.start, w.end):
            weights[i] *= w.value
    out: list[tuple[str, float]] = []
    for c, w in zip(p.text, weights, strict=True):
        w = round(w, 4)
        if out and out[-1][1] == w:
            out[-1] = (out[-1][0] + c, w)
        else:
            out.append((c, w))
    return out


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("\\(literal\\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(a:1.2) b", [("a", 1.2), (" b", 1.0)]),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("a", 0.9091)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("ratio 16:9", [("ratio 16:9", 1.0)]),
        ("\\<tom\\> is text", [("<tom> is text", 1.0)]),
        ("a < b", [("a < b", 1.0)]),
        ("", []),
    ],
)
def test_attention_grammar(source: str, expected: list[tuple[str, float]]) -> None:
    assert weighted_runs(source) == expected


def test_concepts_become_their_category() -> None:
    p = parse("a photo of <tom:0.8> with (<concept:rex>:1.3), <lora:style:0.6>", CATEGORIES)
    assert p.text == "a photo of a cat with a teddy bear, "
    assert p.uses == (ConceptUse("tom", 0.8, 13, 16, has_strength=True), ConceptUse("rex", 1.0, 24, 34))
    assert [(p.text[w.start : w.end], w.value) for w in p.weights] == [("a teddy bear", 1.3)]
    assert p.loras == (("style", 0.6),)
    assert p.names == ("tom", "rex")


@pytest.mark.parametrize(
    ("source", "text"),
    [("<tom>", "a cat"), ("a <tom>", "a cat"), ("my <tom> at night", "my cat at night"),
     ("two <tom>", "two cat"),
     ("a big red <tom>", "a big red cat"), ("a photo of <tom>", "a photo of a cat"),
     ("<rex> and <tom>", "a teddy bear and a cat"), ("a dog and <tom>", "a dog and a cat"),
     ("Ann's <tom>", "Ann's cat"), ("a photo of the <tom>", "a photo of the cat")],
)  # fmt: skip
def test_missing_articles_are_inserted(source: str, text: str) -> None:
    """The twin prompt reads like a caption, with or without an article before the tag."""
    assert parse(source, CATEGORIES).text == text


def test_the_same_concept_twice() -> None:
    p = parse("<tom> and <tom>", CATEGORIES)
    assert p.names == ("tom",)
    assert len(p.uses) == 2


def test_concept_tags_need_no_list_of_concepts() -> None:
    assert concept_tags("<a> (<b:0.2>) <lora:c:1> <concept:d> \\<e\\>") == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("<tim>", "Unknown concept 'tim'. Did you mean 'tom'?"),
        ("<tom:3>", "must lie between 0 and 2"),
        ("<tom:x>", "'x' in <tom:x> is not a number"),
        ("(a:99)", "outside 0 to 10"),
        ("x" * (MAX_PROMPT + 1), "at most 32000"),
    ],
)
def test_invalid_prompts_are_refused(source: str, words: str) -> None:
    with pytest.raises(BadRecipe, match=".*") as e:
        parse(source, CATEGORIES)
    assert words in str(e.value)


def test_at_most_eight_concepts() -> None:
    many = {f"c{i}": "cat" for i in range(9)}
    with pytest.raises(BadRecipe, match="At most 8"):
        parse(" ".join(f"<{n}>" for n in many), many)


def test_unknown_concept_without_any_known_concept() -> None:
    with pytest.raises(UnknownName, match="No concept is known yet"):
        parse("<tom>", {})


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_text_parses_or_is_refused_in_words(source: str) -> None:
    """Never an unexpected exception; spans stay inside the text."""
    try:
        p = parse(source, CATEGORIES)
    except BadRecipe as e:
        assert str(e)
        return
    for span in (*p.uses, *p.weights):
        assert 0 <= span.start <= span.end <= len(p.text)


@pytest.mark.parametrize("hostile", ["(" * 30_000, "<" * 30_000, "\\" * 30_000, "(a:" * 9_000, "<a:" * 9_000])
def test_linear_time(hostile: str) -> None:
    """Ten times the length may not cost much more than ten times the time (guards against ReDoS)."""

    def cost(text: str) -> float:
        best = 1e9
        for _ in range(3):
            t = time.perf_counter()
            try:
                parse(text, {})
            except BadRecipe:
                pass
            best = min(best, time.perf_counter() - t)
        return best

    assert cost(hostile) < 60 * max(cost(hostile[: len(hostile) // 10]), 2e-4)
