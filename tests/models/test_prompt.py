"""Prompt syntax: A1111's grammar, LoRA tags and prompt editing, concept tags; notes for that of other tools."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikin.errors import BadRecipe, UnknownName
from minikin.models import prompt_editing
from minikin.models.prompt import MAX_PROMPT, ConceptUse, concept_tags, parse

CATEGORIES = {"tom": "cat", "rex": "teddy bear", "oscar": "umbrella", "uma": "unicorn", "hugo": "hourglass"}


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
        ("(a: 1.2) b", [("a", 1.2), (" b", 1.0)]),
        ("(a:1.2 ) (b : .5)", [("a", 1.2), (" ", 1.0), ("b ", 0.5)]),
        ("(a:1.) [[b]] ((c:1.2) d)", [("a ", 1.0), ("b", 0.8264), (" ", 1.0), ("c", 1.32), (" d", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 0.9091)]),
        ("[a\\|b] \\(c\\:1.2\\)", [("a|b", 0.9091), (" (c:1.2)", 1.0)]),
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
     ("Ann's <tom>", "Ann's cat"), ("a photo of the <tom>", "a photo of the cat"),
     ("a photo of a big red shiny <tom>", "a photo of a big red shiny cat"),
     ("a cute fluffy little orange <tom> on the beach", "a cute fluffy little orange cat on the beach"),
     ("my very old and grumpy <tom>", "my very old and grumpy cat"),
     ("masterpiece, fluffy orange <tom>", "masterpiece, fluffy orange cat"),
     ("masterpiece, <tom>", "masterpiece, a cat"), ("(shiny:1.2) <tom>", "shiny cat"),
     ("a tall old friendly man holding <tom>", "a tall old friendly man holding a cat"),
     ("a man holding <tom>", "a man holding a cat"), ("a walking <tom>", "a walking cat"),
     ("a girl eats <tom>", "a girl eats a cat"), ("a dog like <tom>", "a dog like a cat"),
     ("the only <tom>", "the only cat"), ("my-<tom>", "my-cat"), ("a photo of<tom>", "a photo of a cat"),
     ("a very old house in the dark woods with <tom>", "a very old house in the dark woods with a cat"),
     ("a big dog BREAK <tom>", "a big dog a cat"), ("3 <tom>", "3 cat"),
     ("<oscar>", "an umbrella"), ("<uma>", "a unicorn"), ("<hugo>", "an hourglass"),
     ("a <oscar> at night", "an umbrella at night"), ("An <uma>", "A unicorn"),
     ("a photo of an (<tom>:1.2)", "a photo of a cat"), ("an old <tom>", "an old cat"),
     ("plan <tom>", "plan cat"),
     ("<tom><rex>", "a cat a teddy bear"), ("<tom@left> <rex@right>", "a cat a teddy bear"),
     ("<tom> big <rex>", "a cat big teddy bear")],
)  # fmt: skip
def test_missing_articles_are_inserted(source: str, text: str) -> None:
    """The twin prompt reads like a caption, with or without an article before the tag."""
    p = parse(source, CATEGORIES)
    assert p.text == text
    assert all(p.text[u.start : u.end] == CATEGORIES[u.name] for u in p.uses)
    assert all(p.text[w.start : w.end].strip() == p.text[w.start : w.end] for w in p.weights)


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
        ("<tom:x>", "'x' in <tom:x> is not a number; write for example <tom:0.8>"),
        ("<lora:ink:0,5>", "'0,5' in <lora:ink:0,5> is not a number; write for example <lora:style:0.8>"),
        ("<lora::1>", "<lora::1> names no LoRA"),
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
    assert all(0 <= at <= len(p.text) for at in p.breaks)


SYNTAX = st.sampled_from(
    [*"()[]<>:|\\ ", "a", "0.5", "10", "BREAK", "AND", "<tom>", "lora:", "++", "{", "}", "--ar"]
)


@given(st.lists(SYNTAX, max_size=40).map("".join))
@settings(max_examples=500, deadline=None)
def test_any_heap_of_syntax_parses_or_is_refused_in_words(source: str) -> None:
    """In every step of an image, too."""
    try:
        p = parse(source, CATEGORIES)
        texts = [text for _, text in p.edits.stages(12)] if p.edits else []
        for text in texts:
            parse(text, CATEGORIES)
    except BadRecipe as e:
        assert str(e)


@pytest.mark.parametrize("hostile", [
    "(" * 30_000, "<" * 30_000, "\\" * 30_000, "(a:" * 9_000, "<a:" * 9_000, " " * 30_000, "a:" + " " * 29_000,
    "[" * 30_000, "[" * 15_000 + "]" * 15_000, "[a|" * 9_000, "[1:" * 9_000, "a" * 30_000, "a++ " * 7_000,
    "_" * 30_000, "{" * 30_000, "+" * 30_000, ")+" * 15_000, "BREAK " * 5_000, "embedding:" * 3_000,
])  # fmt: skip
def test_linear_time(hostile: str) -> None:
    """Ten times the length may not cost much more than ten times the time (guards against ReDoS).

    The time is this thread's on the processor, not the clock's: a busy machine changes nothing.
    """

    def cost(text: str) -> float:
        best = 1e9
        for _ in range(3):
            t = time.thread_time()
            try:
                parse(text, {})
            except BadRecipe:
                pass
            best = min(best, time.thread_time() - t)
        return best

    assert cost(hostile) < 60 * max(cost(hostile[: len(hostile) // 10]), 2e-3)


# ---- A1111's further syntax -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "weight", "text_weight"),
    [("x", 1, 1), ("x:0.8", 0.8, 0.8), ("x:0.8:1", 1, 0.8), ("x:0:1", 1, 0), ("x:te=0.5:unet=0.9", 0.9, 0.5),
     ("x:te=0.5", 0.5, 0.5), ("x:1:unet=0", 0, 1), ("x: 0.8 ", 0.8, 0.8), ("x:-0.5", -0.5, -0.5), ("x:", 1, 1)],
)  # fmt: skip
def test_weights_of_loras_are_a1111_s(tag: str, weight: float, text_weight: float) -> None:
    """One weight for both, or text encoder before U-Net, or by name (extra_networks_lora.py)."""
    p = parse(f"a cat <lora:{tag}>", {})
    assert (p.text, p.loras, p.text_weights, p.notes) == ("a cat ", (("x", weight),), (text_weight,), ())


def test_long_names_of_loras_and_lycoris() -> None:
    name = "a_very_long_name_as_trainers_write_it-000010" * 3
    assert parse(f"<lora:{name}:0.5> <lyco:ink (v2.1):1>", {}).loras == ((name, 0.5), ("ink (v2.1)", 1.0))
    (note,) = parse("<lora:x:1:1:lbw=MIDD>", {}).notes
    assert note == "'lbw=MIDD' of LoRA 'x' is not followed."
    with pytest.raises(BadRecipe, match="'much' in <lora:x:much> is not a number"):
        parse("<lora:x:much>", {})


def test_break_ends_a_chunk() -> None:
    p = parse("a <tom>  BREAK  (a dog:1.2)BREAK, night", CATEGORIES)
    assert p.text == "a cat a dog , night" and p.breaks == (6, 12) and not p.notes
    assert [p.text[w.start : w.end] for w in p.weights] == ["a dog"]
    assert parse("BREAK a", {}).breaks == (0,)
    assert parse("a breakBREAKER", {}).breaks == ()
    with_lora = parse("a  dog <lora:x:1> BREAK <tom>", CATEGORIES)  # removed blanks move the break, too
    assert with_lora.text[with_lora.breaks[0] :] == "a cat"


# as A1111's doctests of get_learned_conditioning_prompt_schedules say, at 10 steps: last step, prompt
@pytest.mark.parametrize(
    ("source", "schedule"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", [(k, "(b:1.1)" if k % 2 == 0 else "a") for k in range(1, 11)]),
        ("[fe|]male", [(k, "male" if k % 2 == 0 else "female") for k in range(1, 11)]),
        ("[fe|||]male", [(k, "female" if k in (1, 5, 9) else "male") for k in range(1, 11)]),
        ("a [dog::0.3] b", [(3, "a dog b"), (10, "a  b")]),
        ("[<tom:0.8>:a <rex>:0.4]", [(4, "<tom:0.8>"), (10, "a <rex>")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
    ],
)
def test_prompt_editing_is_a1111_s(source: str, schedule: list[tuple[int, str]]) -> None:
    edits = prompt_editing.read(source)
    expected = {step: next(text for last, text in schedule if step < last) for step in range(10)}
    assert {step: edits.at(step, 10) if edits else source for step in range(10)} == expected
    if edits:
        starts = dict(edits.stages(10))
        assert starts.keys() == {s for s in range(10) if not s or expected[s] != expected[s - 1]}


def test_an_edited_prompt_is_that_of_its_end() -> None:
    """It needs the concepts and LoRAs of every step."""
    p = parse("[a <tom>:a <rex> <lora:x:1>:0.4] at night", CATEGORIES)
    assert p.text == "a teddy bear at night" and p.names == ("rex",) and p.all_names == ("tom", "rex")
    assert p.loras == (("x", 1.0),)
    assert parse("[cat|dog]", {}).text == "cat" and parse("[cat:dog:10]", {}).text == "dog"
    assert not parse("a [cat]", {}).edits and not parse("a [cat, dog] at 16:9", {}).edits


def test_edits_are_bounded() -> None:
    with pytest.raises(BadRecipe, match="nested more than 20 deep"):
        parse("[" * 25 + "a" + ":0.5]" * 25, {})
    with pytest.raises(BadRecipe, match="8500 characters; one with prompt editing"):
        parse("[a|b] " + "c" * 8494, {})
    many = prompt_editing.read("[" + "|".join(f"w{k}" for k in range(30)) + "]")
    assert many
    with pytest.raises(BadRecipe, match="more than 24 different prompts"):
        many.stages(30)
    assert len(many.stages(20)) == 20


# ---- notes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words", "text"),
    [
        ("a photo of <tom on the beach", "'<tom' is not closed", None),
        ("a photo of <tom:0.8 on it", "'<tom:0.8' is not closed", None),
        ("a photo of tom> on it", "'tom>' is not opened", None),
        ("a photo of tom", "'tom' is a word here and not your concept: write <tom>", None),
        ("a photo of Tom's bed", "'tom' is a word here", None),
        ("a cat AND a dog", "'AND' is A1111's way", None),
        ("<hypernet:ink:1> a cat", "'<hypernet:ink:1>' is left out: hypernetworks", "a cat"),
        ("a cat, embedding:easynegative", "'embedding:easynegative' is ComfyUI's syntax", "a cat, "),
        ("a (embedding:bad/hands.pt:1.2) cat", "'embedding:bad/hands.pt' is ComfyUI's", "a cat"),
        ("<embed:easynegative> a cat", "import the embedding", "a cat"),
        ("<random:red,blue> cat", "SwarmUI", "cat"),
        ("<fromto[0.5]:cat,dog> at night", "SwarmUI", "at night"),
        ("a fluffy++ cat", "'fluffy++' is InvokeAI's weight", None),
        ("a dog-- and a cat", "'dog--' is InvokeAI's weight", None),
        ("a (fluffy cat)++", "InvokeAI's weight", None),
        ("a (fluffy cat)1.3", "InvokeAI's weight", None),
        ('("a cat", "a dog").and()', "InvokeAI's syntax", None),
        ('("a cat", "a dog").blend(0.7, 0.3)', "InvokeAI's syntax", None),
        ("a (cat:1,2)", "is no weight: write one number with a point", None),
        ("a (cat:1.2.3)", "is no weight", None),
        ("a (cat:1e3)", "is no weight", None),
        ("a {red|blue} cat", "wildcards", None),
        ("a __colour__ cat", "wildcard", None),
        ("a {{fluffy}} cat", "NovelAI's emphasis", None),
        ("1.5::fluffy cat::, night", "NovelAI's weight", None),
        ("cat::2 dog", "'cat::2' is Midjourney's weight", None),
        ("a cat --ar 16:9 --v 6", "Midjourney", None),
        ("a cat --n bad --w 512", "kohya", None),
        ("a cat ADDCOL a dog", "extension of A1111", None),
        ("[word:1.2] night", "'[word:1.2]' is prompt editing", " night"),
    ],
)
def test_syntax_that_is_not_followed_is_said_in_one_note(source: str, words: str, text: str | None) -> None:
    p = parse(source, CATEGORIES)
    (note,) = p.notes
    assert words in note and note.endswith(".")
    if text is not None:
        assert p.text == text


@pytest.mark.parametrize(
    "source",
    ["a photo of <tom>", "<tom> and tom", "i <3 cats", "a < b", "an 18+ club", "a well-known cat",
     "5 - 3 = 2", "a - b",
     "a cat, 16:9", "score_9_up, 1girl", "a (cat) on the (beach).", "and so on", "[a:b]",
     "\\<tim\\>", "\\(a\\)1.3", "<lora:x::1>", "a cat -- a dog",
     "e.g. a cat: its bed", "don't", "a photo of a tomcat"],
)  # fmt: skip
def test_ordinary_prompts_have_no_notes(source: str) -> None:
    assert parse(source, CATEGORIES).notes == ()


def test_one_strength_and_names_of_other_kinds() -> None:
    with pytest.raises(BadRecipe, match="more than one strength"):
        parse("<tom:0.8:1>", CATEGORIES)
    assert parse("<random:0.5>", {"random": "cat"}).text == "a cat"  # a concept may be called so
    assert concept_tags("<hypernet:a:1> <lyco:b:1> <embed:c> <random:d,e> <tom:0.5> [<rex>:x:0.5]") == [
        "tom",
        "rex",
    ]
