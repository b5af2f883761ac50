"""The ComfyUI node pack over a stand-in of ComfyUI's API; `test_live` tries it in ComfyUI itself."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minikin.errors import BadRecipe, BaseMismatch, UnknownName
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion.concept import Concept
from minikin.perfusion.conditioning import condition, prepare_concept
from minikin.perfusion.key_lock import category_encoding
from tests.helpers import comfy
from tests.helpers.concepts import random_concept

TEXT = "a photo of <tom> on the beach"
SIGMAS = [4.0, 3.0, 2.0, 1.0, 0.0]


@pytest.fixture
def pack(monkeypatch: Any, tmp_path: Path) -> Any:
    (tmp_path / "minikin").mkdir()
    return comfy.load_pack(monkeypatch, tmp_path)


@pytest.fixture(params=["sd15", "sdxl"])
def base(request: Any, bases: dict[str, Base]) -> Base:
    return bases[request.param]


def concept_of(base: Base, mode: str, name: str = "tom", seed: int = 1) -> Concept:
    concept = random_concept(base, name, seed, mode)
    if mode == "value":
        return concept
    words = tuple(w + d for w, d in zip(base.word_vectors("cat"), concept.word_deltas, strict=True))
    i_star = category_encoding(base, "cat", words)
    return replace(concept, i_star=i_star, dual=i_star.clone())


def clip_of(base: Base) -> comfy.Clip:
    return comfy.Clip(base, "lg" if base.is_xl else "l")


def outputs(pack: Any, base: Base, text: str, *uses: Any, negative: str = "blurry", rows: int = 1) -> list[Any]:
    model, clip = comfy.Model(comfy.UNet(base)), clip_of(base)
    model, positive = pack.nodes_v3.nodes.encode_prompt(model, clip, text, uses)
    return model.sample(positive, clip.encode_from_tokens_scheduled(clip.tokenize(negative)), SIGMAS, rows)


def of_minikin(base: Base, text: str, concept: Concept, strength: float) -> list[Tensor]:
    """The outputs of all layers with Minikin's own packed keys and values, for the same queries."""
    prompts = [parse("blurry", {}), parse(text.replace("<tom>", f"<tom:{strength}>"), {"tom": "cat"})]
    kv = torch.cat([c.kv for c in condition(base, prompts, {"tom": prepare_concept(base, concept)})])
    out = []
    for layer, (_, attention, x) in zip(base.layout.layers, comfy.UNet(base).blocks, strict=True):
        key, value = kv[..., layer.start : layer.start + layer.width], kv[..., layer.value]
        q = attention.to_q(x.expand(2, -1, -1))
        out.append(comfy.optimized_attention(q, key, value, attention.heads))
    return out


@pytest.mark.parametrize("mode", ["value", "gated"])
def test_the_edit_is_minikins_own(pack: Any, base: Base, mode: str) -> None:
    concept = concept_of(base, mode)
    here = outputs(pack, base, TEXT, pack.concepts.ConceptInUse(concept, 0.8))[0]
    there = of_minikin(base, TEXT, concept, 0.8)
    for a, b in zip(here, there, strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    plain = outputs(pack, base, "a photo of a cat on the beach")[0]
    for a, b in zip(here, plain, strict=True):
        assert torch.equal(a[0], b[0]), "the negative prompt"
        assert (a[1] - b[1]).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["value", "gated"])
def test_strength_zero_is_the_plain_image_to_the_bit(pack: Any, base: Base, mode: str) -> None:
    none = pack.concepts.ConceptInUse(concept_of(base, mode), 0.0)
    pairs = zip(
        outputs(pack, base, TEXT, none)[0], outputs(pack, base, "a photo of a cat on the beach")[0], strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_values_change_at_the_categorys_token_alone(pack: Any, bases: dict[str, Base]) -> None:
    """The addition equals one at to_v to the bit, in every image of a batch, and where a prompt is repeated."""
    base, concept = bases["sd15"], concept_of(bases["sd15"], "value")
    text = "(a photo of <tom>:1.3), " + "many very long words " * 30  # three windows beside the negative's one
    _, positive = pack.nodes_v3.nodes.encode_prompt(
        comfy.Model(comfy.UNet(base)), clip_of(base), text, (pack.concepts.ConceptInUse(concept),)
    )
    (e, options), values = positive[0], []
    gate = options["minikin"].gates["tom"]
    tokens = [t for chunk in clip_of(base).tokenize("(a photo of a cat:1.3)")["l"] for t, _ in chunk]
    assert gate.nonzero().flatten().tolist() == [tokens.index(base.tokenizers[0]("cat").input_ids[1])]

    def before(q: Tensor, k: Tensor, v: Tensor, extra: Any) -> Tensor:
        values.append(v)
        return comfy.optimized_attention(q, k, v, extra["n_heads"])

    other = comfy.Model(comfy.UNet(base))
    for block, *_ in other.unet.blocks:
        other.set_model_attn2_replace(before, *block[:2])  # another node's patch, of the whole block
    chained = pack.attention.patched(other, (pack.concepts.ConceptInUse(concept),))
    long = clip_of(base).encode_from_tokens_scheduled(clip_of(base).tokenize("word " * 100))
    chained.sample([[e, options]], long, [2.0, 0.0], rows=2)
    for layer, value in zip(base.layout.layers, values, strict=True):
        repeats = value.shape[1] // e.shape[1]
        context = torch.cat(
            [long[0][0].repeat(2, value.shape[1] // long[0][0].shape[1], 1), e.repeat(2, repeats, 1)]
        )
        expected = base.denoiser.get_submodule(layer.path).to_v(context)
        expected[2:] += gate.repeat(repeats)[:, None] * concept.delta[layer.path]
        assert torch.equal(value, expected)


def test_other_encodings_do_not_get_the_concept(pack: Any, bases: dict[str, Base]) -> None:
    """Nodes of ComfyUI copy an entry's options to other encodings; ComfyUI itself does for areas."""
    base, clip = bases["sd15"], clip_of(bases["sd15"])
    use = pack.concepts.ConceptInUse(concept_of(base, "value"))
    model, positive = pack.nodes_v3.nodes.encode_prompt(comfy.Model(comfy.UNet(base)), clip, TEXT, (use,))
    (e, options), negative = positive[0], clip.encode_from_tokens_scheduled(clip.tokenize("blurry"))
    plain = {name: value for name, value in options.items() if name != "minikin"}

    def first(positive: Any, negative: Any) -> list[Tensor]:
        return model.sample(positive, negative, SIGMAS)[0]

    normal = first([[e, options]], negative)
    zero = first([[e, options]], [[torch.zeros_like(e), options]])
    assert all(map(torch.equal, zero, first([[e, options]], [[torch.zeros_like(e), plain]])))
    area = first([[e, {**options, "area": (4, 4, 0, 0)}]], negative)
    for a, b in zip(area, normal, strict=True):
        assert torch.allclose(a[1], b[0], atol=1e-5) and torch.allclose(a[2], b[1], atol=1e-5)
    average = first([[0.5 * e + 0.5 * negative[0][0], options]], negative)
    assert all(map(torch.equal, average, first([[0.5 * e + 0.5 * negative[0][0], plain]], negative)))
    joined = torch.cat([e, e], 1)  # ConditioningConcat: the concept's token of the first half alone is its own
    half = pack.attention.Entry(options["minikin"], 154).tokens(options["minikin"].gates["tom"], 308)
    assert half.nonzero().flatten().tolist() == [n + half.nonzero()[0].item() for n in (0, 154)]
    assert not torch.allclose(
        first([[joined, options]], negative)[0][1], first([[joined, plain]], negative)[0][1]
    )


def test_two_concepts_and_regions(pack: Any, bases: dict[str, Base]) -> None:
    base = bases["sd15"]
    tom, ann = (concept_of(base, "value", name, seed) for name, seed in (("tom", 1), ("ann", 2)))
    in_use, text = pack.concepts.ConceptInUse, "<tom> and <ann>"
    apart = outputs(pack, base, text, in_use(tom), in_use(ann))
    boxes = pack.concepts.NAMED_BOXES
    sides = outputs(pack, base, text, in_use(tom, box=boxes["left"]), in_use(ann, box=boxes["right"]))
    assert torch.equal(apart[0][0][0], sides[0][0][0]), "the negative prompt"
    assert not torch.allclose(apart[0][0][1], sides[0][0][1])
    assert not torch.allclose(apart[0][0][1], apart[1][0][1]), (
        "regions from attention begin with the second step"
    )
    assert torch.equal(apart[2][0][1], apart[3][0][1]), "and stay as they are"


def test_start_and_end_divide_the_timesteps(pack: Any, bases: dict[str, Base]) -> None:
    base = bases["sd15"]
    use = pack.concepts.ConceptInUse(concept_of(base, "gated"), start=0.25, end=0.75)
    entries = pack.conditioning.encode(clip_of(base), TEXT, (use,))
    spans = [(round(o["start_percent"], 3), round(o["end_percent"], 3), "minikin" in o) for _, o in entries]
    assert spans == [(0.0, 0.25, False), (0.25, 0.75, True), (0.75, 1.0, False)]
    assert torch.equal(entries[0][0], entries[2][0]) and not torch.equal(entries[0][0], entries[1][0])


def test_files_are_loaded_and_chained(pack: Any, bases: dict[str, Base], tmp_path: Path) -> None:
    nodes = pack.nodes_v3.nodes
    concept_of(bases["sd15"], "value").save(tmp_path / "minikin" / "tom.safetensors")
    concept_of(bases["sd15"], "value", "ann").save(tmp_path / "minikin" / "ann.safetensors")
    assert pack.concepts.file_names() == ["ann.safetensors", "tom.safetensors"]
    first = nodes.load("tom.safetensors", 0.5, 0.0, 1.0, "left")
    both = nodes.load("ann.safetensors", 1.0, 0.0, 1.0, "everywhere", "0,20,50,100", "", first)
    assert [(u.concept.name, u.strength, u.box) for u in both] == [
        ("tom", 0.5, (0, 0, 0.5, 1)),
        ("ann", 1.0, (0, 0.2, 0.5, 1)),
    ]
    again = nodes.load("ann.safetensors", 1.0, 0.0, 1.0, "everywhere", "", "eve", both)
    assert [u.concept.name for u in again] == ["tom", "ann", "eve"]
    before = nodes.changed("tom.safetensors")
    (tmp_path / "minikin" / "tom.safetensors").write_bytes(b"no concept")
    assert nodes.changed("tom.safetensors") != before
    for arguments, message in (
        (("tom.safetensors", 1.0, 0.0, 1.0, "left"), "safetensors"),
        (("tim.safetensors", 1.0, 0.0, 1.0, "left"), "models/minikin"),
        (("ann.safetensors", 3.0, 0.0, 1.0, "left"), "between 0 and 2"),
        (("ann.safetensors", 1.0, 0.5, 0.5, "left"), "before end"),
        (("ann.safetensors", 1.0, 0.0, 1.0, "left", "5,5,5,5"), "is no region"),
        (("ann.safetensors", 1.0, 0.0, 1.0, "left", "", "", both), "could mean either"),
    ):
        with pytest.raises(Exception, match=message):
            nodes.load(*arguments)


def test_what_does_not_fit_is_said(pack: Any, bases: dict[str, Base]) -> None:
    base, other = bases["sd15"], bases["sdxl"]
    use = pack.concepts.ConceptInUse(concept_of(base, "value"))
    with pytest.raises(
        BaseMismatch, match=r"which has \d+ cross-attention layers; this model has \d+, or others"
    ):
        pack.attention.patched(comfy.Model(comfy.UNet(other)), (use,))
    transformer = comfy.Model(comfy.UNet(base))
    transformer.unet = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    with pytest.raises(BaseMismatch, match=r"is a Linear; .* Stable Diffusion 1.x, 2.x and XL"):
        pack.attention.patched(transformer, (use,))
    gated = pack.concepts.ConceptInUse(concept_of(base, "gated"))
    with pytest.raises(BaseMismatch, match="Load a checkpoint of its family"):
        pack.conditioning.encode(clip_of(other), TEXT, (gated,))
    turned = replace(gated, concept=replace(gated.concept, i_star=-gated.concept.i_star))
    with pytest.raises(BaseMismatch, match="another text encoder"):
        pack.conditioning.encode(clip_of(base), TEXT, (turned,))
    with pytest.raises(UnknownName, match="Did you mean 'tom'"):
        pack.conditioning.encode(clip_of(base), "<tim> in the snow", (use,))
    with pytest.raises(BadRecipe, match="write <tom>"):
        pack.conditioning.encode(clip_of(base), "<tom:0.8> in the snow", (use,))
    with pytest.raises(BadRecipe, match="Put spaces around it"):
        pack.conditioning.encode(clip_of(base), "super<tom>fish", (use,))


def test_both_kinds_of_node_ask_for_the_same(monkeypatch: Any, tmp_path: Path) -> None:
    pack = comfy.load_pack(monkeypatch, tmp_path)
    v3 = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    described = [node.define_schema() for node in v3]
    schemas = {s.node_id: [i.args[0] for i in s.inputs] for s in described}
    for schema in described:  # ComfyUI refuses an output with an input's name
        assert not {i.args[0] for i in schema.inputs} & {o.args[0] for o in schema.outputs}
    old = comfy.load_pack(monkeypatch, tmp_path, v3=False)
    inputs = {name: node.INPUT_TYPES() for name, node in old.NODE_CLASS_MAPPINGS.items()}
    assert schemas == {n: [*i["required"], *i.get("optional", {})] for n, i in inputs.items()}
    assert set(old.NODE_DISPLAY_NAME_MAPPINGS) == set(schemas)
