"""From prompts to packed keys and values: key locks, several concepts, repeated ones, the negative prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minikin.models.base import Base
from minikin.models.prompt import Prompt, parse
from minikin.perfusion import concept_file, edit
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import PreparedConcept, condition, prepare_concept, unpacked_delta
from minikin.perfusion.key_lock import category_encoding

CATEGORIES = {"tom": "cat", "rex": "teddy bear"}


@pytest.fixture(scope="module")
def loaded(bases: dict[str, Base]) -> dict[str, PreparedConcept]:
    """Two random concepts near their categories on the SD 1.5 miniature."""
    base, out = bases["sd15"], {}
    for k, (name, category) in enumerate(CATEGORIES.items()):
        g = torch.Generator().manual_seed(k)
        e = category_encoding(base, category)
        i_star = e + 0.1 * torch.randn(e.shape, generator=g)
        concept = Concept(
            name=name, category=category, mode="gated", origin=base.origin,
            word_deltas=tuple(0.02 * torch.randn(w.shape, generator=g) for w in base.word_vectors(category)),
            i_star=i_star, dual=edit.dual(i_star, torch.eye(len(e))),
            delta=unpacked_delta(base, torch.randn(base.layout.n_values, generator=g)),
        )  # fmt: skip
        out[name] = prepare_concept(base, concept)
    return out


def make(base: Base, text: str, loaded: dict[str, PreparedConcept], **kwargs: object) -> Tensor:
    return condition(base, [parse(text, CATEGORIES)], loaded, **kwargs)[0].kv  # type: ignore[arg-type]


def keys(base: Base, kv: Tensor) -> Tensor:
    return torch.cat([kv[..., s.start : s.start + s.width] for s in base.layout.layers], -1)


def values(base: Base, kv: Tensor) -> Tensor:
    return torch.cat([kv[..., s.value] for s in base.layout.layers], -1)


def test_two_concepts_match_the_formula_in_float64(
    bases: dict[str, Base], loaded: dict[str, PreparedConcept]
) -> None:
    """W e' and W e' + sum g_j delta_j, written out by hand in float64."""
    base = bases["sd15"]
    prompt = parse("a photo of <tom> next to <rex:0.6>", CATEGORIES)
    with torch.no_grad():
        e = base.encode([prompt], {n: l.words for n, l in loaded.items()}).e[0].double()
        ds = [loaded[n].direction for n in ("tom", "rex")]
        i = torch.stack([d.i_star for d in ds if d]).double()
        m = torch.stack([d.m_i_star for d in ds if d]).double()
        s = (e @ m.T) / (i * m).sum(-1)
        alpha = torch.linalg.solve(m @ i.T, m @ e.T).T
        gates = torch.sigmoid((s - 0.7) / 0.15)
        cats = torch.stack([d.category for d in ds if d]).double()
        edited = e - alpha @ i + gates @ cats
        weaker = edit.strength_gate(loaded["rex"].concept.gate, 0.6)
        value_gates = torch.stack([gates[:, 0], torch.sigmoid((s[:, 1] - weaker.beta) / weaker.tau)], -1)
        deltas = torch.stack([loaded[n].delta for n in ("tom", "rex")]).double()
        kv = make(base, prompt.source, loaded)[0].double()
        weights = [base.denoiser.get_submodule(x.path) for x in base.layout.layers]
        k = torch.cat([edited @ w.to_k.weight.double().T for w in weights], -1)
        v = torch.cat([edited @ w.to_v.weight.double().T for w in weights], -1) + value_gates @ deltas
    assert torch.allclose(keys(base, kv), k, atol=1e-3)
    assert torch.allclose(values(base, kv), v, atol=1e-3)


def test_global_lock_takes_keys_from_the_plain_prompt(
    bases: dict[str, Base], loaded: dict[str, PreparedConcept]
) -> None:
    """Keys are those of the plain category's prompt, bit for bit; values are the local lock's."""
    base = bases["sd15"]
    text = "a photo of <tom> on the beach"
    twin = parse(text, CATEGORIES).text
    local, locked = (make(base, text, loaded, lock=lock) for lock in ("local", "global"))
    plain = condition(base, [Prompt(twin, twin)], {})[0].kv
    assert torch.equal(keys(base, locked), keys(base, plain))
    assert torch.equal(values(base, locked), values(base, local))
    assert not torch.allclose(keys(base, local), keys(base, plain), atol=1e-3)


def test_other_prompts_of_a_batch_are_untouched(
    bases: dict[str, Base], loaded: dict[str, PreparedConcept]
) -> None:
    """The negative prompt beside an edited one equals the same prompt alone: no drift."""
    base = bases["sd15"]
    edited, negative = parse("<tom>", CATEGORIES), Prompt("blurry", "blurry")
    beside, _ = condition(base, [negative, edited], loaded)
    alone, _ = condition(base, [negative, negative], {})
    assert torch.equal(beside.kv, alone.kv)


def test_a_concept_named_twice_has_its_greatest_strength(
    bases: dict[str, Base], loaded: dict[str, PreparedConcept]
) -> None:
    base = bases["sd15"]
    both = make(base, "<tom:0.2> and <tom>", loaded)
    strong = make(base, "<tom> and <tom>", loaded)
    assert torch.allclose(both, strong, atol=1e-6)


def test_two_equal_concepts_do_not_break_the_gram_matrix(
    bases: dict[str, Base], loaded: dict[str, PreparedConcept]
) -> None:
    """One file under two names has equal directions: singular, but finite."""
    base = bases["sd15"]
    twice = {"tom": loaded["tom"], "kim": loaded["tom"]}
    kv = condition(base, [parse("<tom> and <kim>", {"tom": "cat", "kim": "cat"})], twice)[0].kv
    assert torch.isfinite(kv).all()


def test_positions_own_edits_only_the_concepts_tokens(
    bases: dict[str, Base], loaded: dict[str, PreparedConcept]
) -> None:
    """With positions "own", every other token has the projections of the plain encoding."""
    base = bases["sd15"]
    restricted = {"tom": replace(loaded["tom"], positions="own")}
    prompt = parse("a photo of <tom> on the beach", CATEGORIES)
    out = base.encode([prompt], {"tom": loaded["tom"].words})
    plain = base.pack(out.e)
    kv = condition(base, [prompt], restricted)[0].kv
    tokens = (kv - plain).abs().amax(-1)[0].nonzero().flatten().tolist()
    assert tokens == list(out.positions[0][0])


@pytest.mark.parametrize("mode", ["gated", "value"])
def test_trained_keys_are_gated_as_values_are(
    bases: dict[str, Base], loaded: dict[str, PreparedConcept], mode: str
) -> None:
    """Key differences are multiplied by the gate values; a concept with locked keys has none."""
    base, tom = bases["sd15"], loaded["tom"].concept
    if mode == "value":
        nothing = {"word_deltas": (), "i_star": torch.zeros(1), "dual": torch.zeros(1)}
        tom = replace(tom, mode="value", **nothing)
    g = torch.Generator().manual_seed(8)
    moved = torch.randn(base.layout.n_values, generator=g)
    free = concept_file.from_bytes(concept_file.to_bytes(replace(tom, keys=unpacked_delta(base, moved))))
    assert torch.allclose(torch.cat(list(free.keys.values())), moved, atol=2e-3)
    locked = concept_file.from_bytes(concept_file.to_bytes(tom))
    text = "a photo of <tom> in the snow"
    with_locked, with_free = (make(base, text, {"tom": prepare_concept(base, c)}) for c in (locked, free))
    assert torch.equal(values(base, with_locked), values(base, with_free))
    difference = (keys(base, with_free) - keys(base, with_locked))[0]
    gate = difference @ moved / moved.square().sum()
    assert torch.allclose(difference, gate[:, None] * moved, atol=1e-2)
    assert 0.1 < float(gate.max()) <= 1.001
    assert prepare_concept(base, locked).keys is None
